"""launch/*.sh and slurm/*.sh: what they would run, when they start again, what they do with signals; with a stand-in for torchrun."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed import ROOT, environment

AGENT = """#!/bin/bash
# Stands in for torchrun: the n-th start does what the n-th line of $PLAY/lines says, in the shell.
echo >>"$PLAY/starts"
echo "$KINOFORM_LAUNCH" >>"$PLAY/launches"
leave() { echo "$2" >"$KINOFORM_STATUS_DIR/0-$1"; }
train() { leave 0 training; echo "$1" >"$KINOFORM_STATUS_DIR/begun"; }
obey() { trap "echo $1 >>$PLAY/heard; leave 0 $2; exit 1" "$1"; }
eval "$(sed -n "$(wc -l <"$PLAY/starts")p" "$PLAY/lines")"
"""
WAIT = "obey TERM 75; obey USR1 75; obey INT 130; touch $PLAY/ready; for i in {1..300}; do sleep 0.1; done"


class Play:
    """A folder with what torchrun's stand-in does at each of its starts."""

    def __init__(self, folder: Path, lines: list[str]) -> None:
        self.folder = folder
        (folder / "lines").write_text("\n".join(lines) + "\n")
        (folder / "agent").write_text(AGENT)
        (folder / "agent").chmod(0o755)

    def start(self, *arguments: str, script: str = "single_node", **variables: str) -> "subprocess.Popen[str]":
        values = {"PLAY": str(self.folder), "PYTHON": str(self.folder / "agent"), "BACKOFF": "0", "PROCESSES": "1", **variables}
        command = [f"launch/{script}.sh", "train_ae.py", "--results-dir", str(self.folder / "runs"), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment(**values), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, **variables: str) -> tuple[int, int, str]:
        """Exit status, number of starts, output."""
        return self.end(self.start(**variables))

    def end(self, process: "subprocess.Popen[str]") -> tuple[int, int, str]:
        with process:
            try:
                output, _ = process.communicate(timeout=60)
            finally:
                process.kill()
        return process.returncode, len((self.folder / "starts").read_text()), output

    def wait(self, name: str) -> None:
        limit = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert time.monotonic() < limit
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("lines", "restarts", "status", "starts"),
    [
        (["exit 0"], 5, 0, 1),
        (["leave 0 1; exit 1", "exit 1", "exit 0"], 5, 0, 3),
        (["exit 1"] * 9, 2, 1, 3),
        (["exit 1"] * 9, 0, 1, 1),
        (["train None; exit 1", "train step_2; exit 1", "train step_4; exit 1", "exit 0"], 1, 0, 4),
        (["train step_2; exit 1", "exit 1", "train step_2; exit 1", "exit 0"], 2, 1, 3),
        (["leave 0 2; exit 1", "exit 0"], 5, 2, 1),
        (["exit 2", "exit 0"], 5, 2, 1),
        (["leave 0 75; exit 1", "exit 0"], 5, 75, 1),
    ],
    ids=[
        "done",
        "fails twice",
        "gives up",
        "never again",
        "fails but moves on",
        "does not move on",
        "wrong settings",
        "wrong flags",
        "stopped on another machine",
    ],
)
def test_when_it_starts_again(lines: list[str], restarts: int, status: int, starts: int, tmp_path: Path) -> None:
    ended = Play(tmp_path, lines).run(RESTARTS=str(restarts))
    assert ended[:2] == (status, starts), ended[2]
    told = [f"({n} of {restarts} without a new checkpoint" in ended[2] for n in range(1, restarts + 1)]
    assert not any(told) if starts == 1 or status in (2, 75) else told[0]
    assert ("giving up with status" in ended[2]) == (status in (1, 2))


def test_a_stop_that_not_all_processes_followed_is_a_failure(tmp_path: Path) -> None:
    assert Play(tmp_path, ["leave 0 75; exit 1", "exit 0"]).run(PROCESSES="2")[:2] == (0, 2)


def test_an_elastic_launch_goes_on_without_the_machine_that_is_told_to_stop(tmp_path: Path) -> None:
    """Also when the processes had other ranks before, and more often than it would start again after failures."""
    ended = Play(tmp_path, ["leave 0 75; exit 1"] * 4 + ["exit 0"]).run(PROCESSES="1", NODES="1:2", RESTARTS="1")
    assert ended[:2] == (0, 5) and ended[2].count("stopped with another machine: starting again in 0 s") == 4, ended[2]


def test_a_folder_of_statuses_that_was_given_keeps_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/0").write_text("75\n")
    ended = Play(tmp_path, ["exit 1", "exit 0"]).run(KINOFORM_STATUS_DIR=str(tmp_path / "mine"))
    assert ended[:2] == (0, 2), ended[2]
    assert [place.name for place in (tmp_path / "mine").rglob("*")] == ["0"]


def test_all_starts_of_a_launch_have_one_name_that_no_other_launch_has(tmp_path: Path) -> None:
    play = Play(tmp_path, ["exit 1", "exit 0", "exit 0"])
    for _ in range(2):
        play.run()
    first, again, other = (tmp_path / "launches").read_text().split()
    assert first == again != other and len(first) == 16


@pytest.mark.parametrize(
    ("number", "status", "heard"),
    [(signal.SIGTERM, 75, "TERM"), (signal.SIGUSR1, 75, "USR1"), (signal.SIGHUP, 75, "TERM"), (signal.SIGINT, 130, "INT")],
)
def test_a_signal_is_passed_on_once_and_ends_it(number: signal.Signals, status: int, heard: str, tmp_path: Path) -> None:
    play = Play(tmp_path, [WAIT, "exit 0"])
    process = play.start()
    play.wait("ready")
    process.send_signal(number)
    ended = play.end(process)
    assert ended[:2] == (status, 1), ended[2]
    assert (tmp_path / "heard").read_text().split() == [heard]


def test_a_second_signal_is_not_passed_on(tmp_path: Path) -> None:
    """It would end torchrun while its processes save."""
    hear = "trap 'echo TERM >>$PLAY/heard' TERM; touch $PLAY/ready; until [ -e $PLAY/saved ]; do sleep 0.1; done; leave 0 75; exit 1"
    play = Play(tmp_path, [hear])
    process = play.start()
    for name in ("ready", "heard"):
        play.wait(name)
        process.terminate()
    time.sleep(0.7)
    (tmp_path / "saved").touch()
    assert play.end(process)[:2] == (75, 1)
    assert (tmp_path / "heard").read_text() == "TERM\n"


def test_a_signal_between_two_starts_ends_it(tmp_path: Path) -> None:
    play = Play(tmp_path, ["exit 1", "exit 0"])
    process = play.start(BACKOFF="50")
    assert process.stdout is not None
    assert "starting again in 50 s" in process.stdout.readline()
    process.terminate()
    assert play.end(process)[:2] == (75, 1)


@pytest.mark.parametrize("command", ["mktemp", "rm", "setpriv"])
def test_a_signal_while_a_start_is_prepared_is_not_lost(command: str, tmp_path: Path) -> None:
    """On a slow file system that takes seconds."""
    play = Play(tmp_path, [WAIT])
    (tmp_path / "starts").touch()
    slow = tmp_path / "bin" / command
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/bash\ntouch "$PLAY/ready"; sleep 1\nexec {shutil.which(command)} "$@"\n')
    slow.chmod(0o755)
    process = play.start(PATH=f"{slow.parent}:{os.environ['PATH']}")
    play.wait("ready")
    process.terminate()
    assert play.end(process)[:2] == (75, 0)


@pytest.mark.parametrize(
    "line",
    [
        "trap '' TERM; train None; touch $PLAY/ready; for i in {1..300}; do sleep 0.1; done",
        "train None; obey TERM 1; touch $PLAY/ready; for i in {1..300}; do sleep 0.1; done",
        "train None; touch $PLAY/ready; exec sleep 50",
    ],
    ids=["does not end", "saving fails", "is killed"],
)
def test_a_stop_that_was_not_saved_is_told(line: str, tmp_path: Path) -> None:
    play = Play(tmp_path, [line])
    process = play.start(GRACE="1")
    play.wait("ready")
    process.terminate()
    ended = play.end(process)
    assert ended[:2] == (1, 1) and "but it was not saved: the same command goes on from the last checkpoint" in ended[2], ended[2]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_a_killed_script_takes_its_command_with_it(tmp_path: Path) -> None:
    play = Play(tmp_path, [WAIT])
    process = play.start(KINOFORM_STATUS_DIR=str(tmp_path))
    play.wait("ready")
    process.kill()
    play.wait("heard")
    play.end(process)


def dry_run(script: str, *arguments: str, code: int = 0, **variables: str) -> str:
    command = [script, "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_what_would_be_run() -> None:
    told = dry_run("launch/single_node.sh", "train_ae.py", "--run-name", "it's", PYTHON="python", PROCESSES="4")
    assert told.startswith("python -m torch.distributed.run --standalone --nproc-per-node=4 --max-restarts=0 ")
    assert told.endswith(" -- train_ae.py --run-name 'it'\\''s'\n")
    assert dry_run("launch/single_node.sh", "nothing.py", code=2).startswith("error: usage: ")


def test_what_would_be_submitted() -> None:
    variables = {
        "NODES": "4",
        "CPUS": "64",
        "GPUS": "8",
        "TIME": "1:00:00",
        "ACCOUNT": "us",
        "AFTER": "3:4",
        "WARNING": "60",
        "SBATCH_ARGS": "--qos a -x n3",
    }
    told = dry_run("slurm/submit.sh", "train_ae.py", "--config", "a b.yaml", **variables)
    flags = "--cpus-per-task=64 --time=1:00:00 --account=us --dependency=afterok:3:4 --kill-on-invalid-dep=yes --signal=B:USR1@60"
    flags += " --nodes=4 --gres=gpu:8"
    assert told == f"sbatch --parsable --export=ALL {flags} --qos a -x n3 slurm/train.sbatch train_ae.py --config 'a b.yaml'\n"
    assert "warning: CPUS is not given" in dry_run("slurm/submit.sh", "train_ae.py", GPUS="8")
    told = dry_run("slurm/submit.sh", "shards", "VIDEOS", "--out", "SHARDS", ARRAY="0-7", NAME="digits", LOGS="logs")
    assert told.endswith("--array=0-7 --output=logs/%x-%A_%a.log slurm/preprocess.sbatch VIDEOS --out SHARDS\n")
    assert dry_run("slurm/submit.sh", "train.py", code=2).startswith("error: train.py: no such script; give shards, or one of ")


@pytest.mark.parametrize("script", ["single_node", "multi_node"])
def test_a_script_that_is_edited_while_it_runs_ends_as_it_began(script: str, tmp_path: Path) -> None:
    for name in ("launch", "train_ae.py"):
        (shutil.copytree if name == "launch" else shutil.copy)(ROOT / name, tmp_path / name)
    play, copy = Play(tmp_path, ["exit 0"]), tmp_path / f"launch/{script}.sh"
    edit = f"echo 'exit 9' >>{copy}; sed 's/^# Runs/# Runs more than before:/' {copy} >{copy}.new; cat {copy}.new >{copy}; exit 0"
    (tmp_path / "lines").write_text(edit + "\n")
    values = {"PLAY": str(play.folder), "PYTHON": str(tmp_path / "agent"), "PROCESSES": "1", "HOST": "127.0.0.1", "NODES": "1"}
    done = subprocess.run([copy, "train_ae.py"], env=environment(**values), text=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
