"""A run folder belongs to one command at a time, and to nobody once its process is gone, however it went."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import lock
from engine.lock import RunLock
from engine.runs import open_run
from launch.env import Env
from tests.distributed import ROOT, environment
from tests.toy_task import toy_config
from utils.errors import UserError

HOLD = """
import os, sys, time
from pathlib import Path
from engine.lock import RunLock
held = RunLock()
held.take(Path(sys.argv[1]), 0)
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
"""Holds the lock, and has a child that lives on, as a worker of a killed run does for some seconds."""


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = open_run(toy_config(tmp_path), "toy", Env.single())
    run.close()
    return run.folder


@pytest.fixture
def holder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process
        os.kill(child, signal.SIGKILL)
        process.kill()


@pytest.mark.usefixtures("patience")
def test_a_second_command_ends_with_one_line_that_names_the_first(folder: Path, holder: "subprocess.Popen[str]") -> None:
    for resume in ("auto", str(folder)):
        (folder / "checkpoints/step_0000001").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError) as caught:
            open_run(toy_config(folder.parent, resume=resume), "toy", Env.single())
        line = str(caught.value)
        assert line.startswith(f"{folder} is in use by process {holder.pid} on {os.uname().nodename}, since ")
        assert "--resume none" in line and "\n" not in line
    assert (folder / "checkpoints/step_0000001").is_dir(), "a damaged checkpoint of another's run is left alone"
    other = open_run(toy_config(folder.parent, resume="none"), "toy", Env.single())
    assert other.folder != folder
    other.close()


def test_the_lock_of_a_killed_process_is_free_though_its_child_lives(folder: Path, holder: "subprocess.Popen[str]") -> None:
    taken = RunLock()
    with pytest.raises(UserError):
        taken.take(folder, 0)
    holder.kill()
    began = time.monotonic()
    taken.take(folder)
    assert time.monotonic() - began < 5
    assert f"process {os.getpid()} " in (folder / "lock").read_text()
    taken.close()
    taken.close()


def test_a_run_that_has_ended_is_free(folder: Path) -> None:
    """In one process nothing would notice, so another one looks."""
    run = open_run(toy_config(folder.parent), "toy", Env.single())
    look = "import sys; from pathlib import Path; from engine.lock import RunLock; RunLock().take(Path(sys.argv[1]), 0)"

    def is_free() -> bool:
        return subprocess.run([sys.executable, "-c", look, str(folder)], cwd=ROOT, env=environment(), capture_output=True).returncode == 0

    assert run.folder == folder and not is_free()
    run.close()
    assert is_free()


def test_a_file_system_without_locks_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    taken = RunLock()
    taken.take(folder, 0)
    assert "Operation not supported" in caplog.text and str(folder) in caplog.text
    taken.close()
