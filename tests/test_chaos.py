"""Random processes of a run killed at random moments, over and over: what comes out are the bytes of a run that was left alone.

KINOFORM_TEST_KILLS: another number of kills, for a quicker look.
"""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import distributed
from tests.distributed import ROOT, environment
from tests.processes import MARK, Processes, saved, until
from tests.shard_sets import write_set

WORKER = str(Path(__file__).with_name("chaos_worker.py"))
KILLS = int(os.environ.get("KINOFORM_TEST_KILLS", "25"))
STEPS, EVERY = 90, 3
PACE = 0.04
"""Seconds that each step is made to last while processes are killed."""
SEED = 8
MOMENTS = {
    "saved": ("rank", "agent", "loader"),
    "writing": ("rank", "rank", "agent", "loader"),
    "start": ("rank", "rank", "agent"),
    "steps": ("rank", "agent", "loader"),
}
"""When processes are killed, and which: after a checkpoint; while one is written; while they start; after the first step."""
ORDER = ("saved", "writing", "start", "writing", "steps", "writing")


def plan(kills: int, chance: random.Random) -> list[tuple[str, list[str]]]:
    """For each start of the run a moment, and the kinds of the one to three processes that are killed at once then."""
    starts = []
    for moment in itertools.cycle(ORDER):
        kinds = chance.sample(MOMENTS[moment], min(kills, chance.choice((1, 2, 3))))
        starts.append((moment, sorted(kinds, reverse=True)))  # the agent is the last: its end is that of the others
        kills -= len(kinds)
        if not kills:
            break
    return starts


def command(results: Path, shards: Path, *options: str) -> list[str]:
    return [WORKER, str(results), "--shards", str(shards), "--steps", str(STEPS), "--every", str(EVERY), *options]


def torn(results: Path) -> list[Path]:
    """Checkpoints that are being written, or that a kill has left half written."""
    return list(results.glob("*/checkpoints/.step_*.tmp"))


def kill_some(processes: Processes, results: Path, chance: random.Random, moment: str, kinds: list[str]) -> bool:
    """Kill processes, and wait until the agent and the ranks of that start are gone. Returns whether that cut a checkpoint."""
    assert until(lambda: len(processes.of_kind("rank")) == 2, 90), "the run is started again"
    before = saved(results)
    if moment != "start":
        assert until(lambda: len(processes.of_kind("loader")) == 2, 90), "the loaders' processes start"
    if moment == "saved":
        assert until(lambda: saved(results) > before, 90), "a checkpoint is committed"
    if moment != "writing":
        time.sleep(chance.uniform(0, 0.8 if moment == "start" else 0.2))
    there = {kind: processes.of_kind(kind) for kind in ("agent", "rank", "loader")}
    victims = [number for kind in sorted({*kinds}, reverse=True) for number in chance.sample(there[kind], kinds.count(kind))]
    if moment == "writing":  # the victims are chosen: a toy's checkpoint is written in some hundredths of a second
        assert until(lambda: torn(results), 90, 0.0005), "a checkpoint is written"
    for number in victims:
        os.kill(number, signal.SIGKILL)
    gone = {*there["agent"], *there["rank"]}
    assert until(lambda: not gone & processes.all().keys(), 40), f"killed {victims}, but these do not end {gone}: {processes.all()}"
    return moment == "writing" and bool(torn(results))


def test_all_kinds_are_killed_at_all_moments() -> None:
    starts = plan(25, random.Random(SEED))
    assert sum(len(kinds) for _, kinds in starts) == 25
    assert {(moment, kind) for moment, kinds in starts for kind in kinds} == {
        (moment, kind) for moment in MOMENTS for kind in MOMENTS[moment]
    }


def is_trial(place: Path) -> bool:
    """Whether it is an empty file, by which torch's loader tries if files can be opened once one of its processes has died."""
    return place.is_file() and not place.stat().st_size and re.fullmatch(r"tmp[a-z0-9_]{8}", place.name) is not None


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A TMPDIR: sockets in it must not have long paths."""
    with tempfile.TemporaryDirectory(prefix="kf", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_random_kills_change_nothing(tmp_path: Path, short_folder: Path) -> None:
    results, whole, pace, temporary = tmp_path / "results", tmp_path / "whole", tmp_path / "pace", short_folder
    shards = write_set(tmp_path / "shards", [8], codec="mp4", lengths=(4,), size=(16, 16))
    pace.write_text(str(PACE))
    processes, chance, cut = Processes(), random.Random(SEED), 0
    starts = plan(KILLS, chance)
    variables = {MARK: processes.mark, "TMPDIR": str(temporary), "PYTHON": sys.executable, "PROCESSES": "2"}
    variables |= {"BACKOFF": "0", "RESTARTS": "40", "RESULTS": str(results)}
    script = ["bash", str(ROOT / "launch/single_node.sh"), *command(results, shards, "--pace", str(pace))]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        launch = subprocess.Popen(script, cwd=ROOT, env=environment(**variables), stdout=output, stderr=output, start_new_session=True)
    try:
        for moment, kinds in starts:
            assert launch.poll() is None, log.read_text()[-6000:]
            cut += kill_some(processes, results, chance, moment, kinds)
        pace.unlink()
        assert launch.wait(240) == 0, log.read_text()[-6000:]
        assert until(lambda: not processes.all(), 20), f"orphans: {processes.all()}"
    finally:
        processes.kill()
        launch.wait(20)
    print(f"killed: {', '.join(f'{moment} {kinds}' for moment, kinds in starts)}; {cut} checkpoints cut")
    writes = sum(moment == "writing" for moment, _ in starts)
    assert cut >= writes // 2, f"{cut} of {writes} kills have left a half-written checkpoint"

    done = distributed.command(command(whole, shards), 2, 240)
    assert done.returncode == 0, done.stderr
    (folder,) = results.iterdir()
    for name in ("model.safetensors", "ema.safetensors", "config.json", "README.md"):
        assert (folder / "export" / name).read_bytes() == (whole / folder.name / "export" / name).read_bytes()
    files = {str(place.relative_to(folder)) for place in folder.rglob("*") if "faults" not in place.parts}
    assert files == {str(place.relative_to(whole / folder.name)) for place in (whole / folder.name).rglob("*")}
    known = re.compile(r"torchelastic_.*|torchinductor_.*|pymp-.*")
    left = [place for place in temporary.iterdir() if not known.fullmatch(place.name) and not is_trial(place)]
    assert not left, f"more than torch's and Python's own: {left}"
