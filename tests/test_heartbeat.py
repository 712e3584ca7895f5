"""The heartbeat of a run: what it says while the run starts, goes on, hangs, and once it has ended."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from distributed import ROOT
from toy_task import toy_config

from engine import manifest
from engine.heartbeat import FILE, Beat, Heartbeat, judge, read
from engine.recorder import Recorder
from engine.runs import open_run
from launch.env import Env, Stopped


def written(folder: Path, after: float = 0.0) -> Beat:
    """The first heartbeat that was written after a moment."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(OSError):
            if (beat := read(folder)).time > after:
                return beat
        time.sleep(0.01)
    raise AssertionError("no heartbeat")


def test_a_heartbeat_lives_and_tells_the_end(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3, 9, every=0.02)
    heartbeat.start()
    heartbeat.beat(4)
    under_way = written(tmp_path, time.time())  # perhaps with the step before: it may have been begun before the step ended
    first = written(tmp_path, under_way.time)
    second = written(tmp_path, first.time)  # while no step ends
    assert (second.step, second.total, second.state, second.pid, second.host) == (4, 9, "running", os.getpid(), socket.gethostname())
    assert second.stepped == first.stepped, "it says since when no step has ended"
    heartbeat.stop("stopped")
    assert read(tmp_path).state == "stopped"
    assert [place.name for place in tmp_path.iterdir()] == [FILE]


def test_a_heartbeat_tells_a_run_that_hangs_from_one_that_is_gone() -> None:
    beat = Beat(step=7, total=9, stepped=1000.0, time=1100.0, pid=12, host="node-b", state="running")
    assert judge(beat, 1101.0, 200.0) == (True, "running: step 7/9 on node-b, process 12, the last step ended 101 s ago")
    well, words = judge(beat, 1101.0, 60.0)
    assert not well and words.startswith("hangs: step 7/9 on node-b, process 12 lives, but no step ended for 100 s")
    well, words = judge(beat, 2000.0, 600.0)
    assert not well and words.startswith("gone: ")
    beat = dataclasses.replace(beat, state="starting")
    assert judge(beat, 1200.0, 60.0, max_start=600.0) == (True, "starting: process 12 on node-b, for 100 s"), "it may load for long"
    assert not judge(beat, 1800.0, 60.0, max_start=600.0)[0]


def test_a_run_that_failed_has_time_to_start_again() -> None:
    """A probe that fails meanwhile would kill the pod in which a launch script starts it again."""
    beat = Beat(step=7, total=9, stepped=1000.0, time=1100.0, pid=12, host="node-b", state="failed")
    assert judge(beat, 1400.0, 60.0, 600.0) == (True, "failed at step 7/9 on node-b, process 12, 300 s ago, and has not started again")
    assert not judge(beat, 1701.0, 60.0, 600.0)[0]
    assert judge(dataclasses.replace(beat, state="stopped"), 9e9, 60.0, 600.0) == (True, "stopped at step 7/9 on node-b, process 12")


def test_a_run_that_starts_says_so_before_it_looks_at_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, env = toy_config(tmp_path), Env.single()
    run = open_run(config, "toy", env)
    assert read(run.folder).state == "starting"
    Heartbeat(run.folder, 3, 9).stop("failed")
    run.close()
    seen: list[str] = []
    monkeypatch.setattr(manifest, "folders", lambda folder: seen.append(read(folder).state) or [])
    open_run(config, "toy", env).close()
    assert seen == ["starting"], "a probe would end it for the failure of the attempt before"


def test_the_command_that_reads_a_heartbeat(tmp_path: Path) -> None:
    def ask(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "engine.heartbeat", str(tmp_path), *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert ask()[0] == 2
    heartbeat = Heartbeat(tmp_path, 3, 9)
    heartbeat.stop("done")
    assert ask() == (0, f"done at step 3/9 on {socket.gethostname()}, process {os.getpid()}\n")
    beat = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(beat | {"state": "running", "time": beat["time"] - 99, "stepped": beat["stepped"] - 99}))
    assert ask("--max-age", "60")[0] == 1 and ask("--max-age", "999")[0] == 0
    (tmp_path / FILE).write_text("{}")
    assert ask()[0] == 2


def test_the_reader_needs_no_torch() -> None:
    code = "import sys, engine.heartbeat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(("error", "state"), [(Stopped(), "stopped"), (RuntimeError(), "failed"), (KeyboardInterrupt(), "stopped")])
def test_the_heartbeat_knows_how_a_run_ended(tmp_path: Path, error: BaseException, state: str) -> None:
    config = toy_config("unused").log
    with pytest.raises(type(error)), Recorder(tmp_path, config, is_main=True, step=2, total=5) as recorder:
        recorder.advance()
        raise error
    assert (read(tmp_path).step, read(tmp_path).state) == (3, state)
