"""launch/*.sh with torchrun: runs that are killed and stopped end with the weights of a run that was left alone."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed import ROOT, command, environment
from tests.test_launch import free_port

WORKER = "tests/cluster_worker.py"
PATIENCE = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an undisturbed run of two processes."""
    results = tmp_path_factory.mktemp("whole")
    done = command([WORKER, "--results-dir", results, "--max-steps", 30], 2)
    assert done.returncode == 0, done.stderr
    return results / "000-toy/export"


class Launched:
    """A launch script with the toy stage."""

    def __init__(self, script: str, results: Path, seconds: float, *arguments: str, **variables: str) -> None:
        self.place = results.parent / f"{results.name}-{time.monotonic_ns()}.log"
        command = [f"launch/{script}.sh", WORKER, "--results-dir", str(results), "--max-steps", "30", "--seconds", str(seconds), *arguments]
        env = environment(PYTHON=sys.executable, BACKOFF="1", **variables)
        with self.place.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self.place.read_text()

    def reads(self, pattern: str, times: int = 1) -> str:
        """The group of a pattern's n-th match in what the script prints, once it is there."""
        limit = time.monotonic() + PATIENCE
        while len(found := re.findall(pattern, self.log)) < times:
            assert time.monotonic() < limit and self.process.poll() is None, self.log
            time.sleep(0.05)
        return found[times - 1]

    def ends(self, status: int) -> None:
        assert self.process.wait(PATIENCE) == status, self.log


@contextmanager
def launched(script: str, results: Path, seconds: float, *arguments: str, **variables: str) -> Iterator[Launched]:
    """It is killed at the end of the block at the latest."""
    launch = Launched(script, results, seconds, *arguments, **variables)
    try:
        yield launch
    finally:
        launch.process.terminate()  # and with it torchrun and the workers
        try:
            launch.process.wait(20)
        finally:
            launch.process.kill()


def reaches(results: Path, count: int) -> None:
    limit = time.monotonic() + 120
    while len(list(results.glob("*/checkpoints/step_*"))) < count:
        assert time.monotonic() < limit
        time.sleep(0.05)


def same(results: Path, whole: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors"):
        assert (results / "000-toy/export" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_one_machine_goes_on_after_a_killed_process_and_after_a_stop(tmp_path: Path, whole: Path) -> None:
    results, statuses = tmp_path / "results", tmp_path / "statuses"
    statuses.mkdir()
    with launched("single_node", results, 0.3, PROCESSES="2", KINOFORM_STATUS_DIR=str(statuses)) as launch:
        victim = int(launch.reads(r"rank 1 is process (\d+)"))
        reaches(results, 1)
        os.kill(victim, signal.SIGKILL)
        launch.reads(r"starting again in 1 s \(1 of 5")
        launch.reads(r"from step [1-9]\d* to 30")
        (begun,) = statuses.glob(".kinoform-run.*/begun")
        assert re.search(r"/step_0*[1-9]\d*$", begun.read_text().strip()), "the next start can tell whether this one has got on"
        launch.process.terminate()
        launch.ends(75)
        assert "saved at step" in launch.log
    with launched("single_node", results, 0, PROCESSES="2") as launch:
        launch.ends(0)
    same(results, whole)


@pytest.mark.slow
def test_several_machines_start_again_together(tmp_path: Path, whole: Path) -> None:
    where = {"HOST": "127.0.0.1", "PORT": str(free_port()), "NODES": "2", "PROCESSES": "1"}
    results = tmp_path / "results"
    with launched("multi_node", results, 0.3, **where) as one, launched("multi_node", results, 0.3, **where) as other:
        victim = int(other.reads(r"rank \d is process (\d+)"))
        reaches(results, 1)
        os.kill(victim, signal.SIGKILL)
        for launch in (one, other):
            launch.ends(0)
            assert "starting again in" in launch.log
    same(results, whole)


@pytest.mark.slow
def test_a_machine_joins_and_when_it_is_told_to_stop_the_other_goes_on_alone(tmp_path: Path) -> None:
    """Also with --resume none: it is one launch, and makes one run."""
    where = {"HOST": "127.0.0.1", "PORT": str(free_port()), "NODES": "1:2", "PROCESSES": "1", "LAST_CALL": "2"}
    results = tmp_path / "results"
    with launched("multi_node", results, 3, "--resume", "none", **where) as one:
        one.reads(r"from step 0 to 30, (1) process")
        with launched("multi_node", results, 3, "--resume", "none", **where) as other:
            one.reads(r"saved at step")
            ranks = {other.reads(r"rank (\d) is process"), one.reads(r"rank (\d) is process", times=2)}
            other.process.terminate()
            other.ends(75)
        one.reads("stopped with another machine: starting again")
        one.reads(r"rank (\d) is process", times=3)
        one.process.terminate()
        one.ends(75)
        assert ranks == {"0", "1"} and "failed with status" not in one.log, one.log
    starts = re.findall(r"from step (\d+) to 30, (\d) process", (results / "000-toy/log.txt").read_text())
    assert [count for _, count in starts] == ["1", "2", "1"] and sorted(starts, key=lambda start: int(start[0])) == starts, starts
