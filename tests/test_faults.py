"""A rank that dies, hangs or starves ends the run on all ranks in a set time, with a line that names it; fewer ranks take more turns."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.elastic import for_ranks
from engine.shard import samples_per_rank
from launch.env import Env
from tests.distributed import ROOT, command, environment, torchrun
from tests.processes import MARK, Processes, saved, until
from tests.toy_task import toy_config
from utils.errors import ConfigError

WORKER = str(Path(__file__).with_name("chaos_worker.py"))
HOST = re.escape(socket.gethostname())
HANGS = ("starved", "asleep")
"""Faults that every rank lives on in, and finds by itself: torchrun is of no use there, and left out."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def lines_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def suffer(folder: Path, fault: str, *options: str, processes: int = 2, timeout: float = 150) -> str:
    """Our one line on the fault of rank 1 in step 4."""
    # Far longer than `timeout`, the collectives' own would end it only after this has failed; an option may set a shorter one.
    line = [WORKER, str(folder), "--fault", fault, "--timeout", "400", *options]
    done = command(line, processes, timeout) if fault in HANGS else torchrun(line, processes, timeout)
    # An agent that cannot end a frozen worker within its grace is ended with it.
    said = done.stdout + (done.stderr or "")
    assert done.returncode == (-signal.SIGKILL if fault == "frozen" else 1), said
    found = lines_of(said)
    assert len(found) == 1, said
    return found[0]


def test_a_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    line = suffer(tmp_path, "killed", "--batch", "6", processes=3)
    assert re.fullmatch(
        rf"error: (\[rank 2\] )?the (run lost a rank|ranks lost each other.*): rank 1 on {HOST} \(process \d+\) is gone: .*", line
    ), line


def test_a_rank_that_does_not_feel_the_loss_is_ended_by_its_thread(tmp_path: Path) -> None:
    line = suffer(tmp_path, "deserted")
    assert re.fullmatch(rf"error: the run lost a rank: rank 1 on {HOST} \(process \d+\) is gone: killed, or crashed", line), line
    assert "in loss" in next(tmp_path.glob("*/faults/rank_0.txt")).read_text()


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("frozen", rf"rank 1 on {HOST} \(process \d+\) is there, but does not answer: stopped, or stuck"),
        ("starved", rf"all wait for rank 1 on {HOST} \(process \d+\), which is in step 4 at tests/chaos_worker.py:\d+ batches"),
    ],
)
def test_a_rank_that_hangs_is_named_in_the_set_time_and_stacks_are_left(tmp_path: Path, fault: str, pattern: str) -> None:
    line = suffer(tmp_path, fault, "--step-timeout", "8")
    found = re.fullmatch(rf"error: (\[rank 1\] )?step 4 did not end within 8 s: {pattern}; the stacks of all threads are in (\S+)", line)
    assert found, line
    stacks = (Path(found[2]) / "rank_0.txt").read_text()
    assert f"rank 0 on {socket.gethostname()}" in stacks and "torch/distributed" in stacks and "engine/loop.py" in stacks
    if fault != "frozen":
        assert "chaos_worker.py" in (Path(found[2]) / "rank_1.txt").read_text()


def test_a_hang_between_steps_is_found_by_the_timeout_of_the_collectives(tmp_path: Path) -> None:
    line = suffer(tmp_path, "asleep", "--at", "0", "--timeout", "15")  # the first step may take any time
    who = rf"all wait for rank 1 on {HOST} \(process \d+\), which is in step 1 at tests/chaos_worker.py:\d+ suffer"
    assert re.fullmatch(rf"error: the ranks lost each other in step 1: {who}", line), line


def test_the_error_of_a_rank_on_another_node_is_told_here(tmp_path: Path) -> None:
    flags = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--max-restarts=0"]
    line = [sys.executable, "-m", "torch.distributed.run", *flags, WORKER, str(tmp_path), "--fault", "bug"]
    nodes = [subprocess.Popen(line, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        outputs = [node.communicate(timeout=90)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [1, 1]
    there = rf"error: rank 1 on {HOST} \(process \d+\) failed: ZeroDivisionError: ours"
    assert sum(any(re.fullmatch(there, line) for line in lines_of(output)) for output in outputs) == 1, outputs
    assert sum("in suffer" in output and not re.search(there, output) for output in outputs) == 1, outputs


def test_one_process_that_hangs_ends_too(tmp_path: Path) -> None:
    done = command([WORKER, tmp_path, "--fault", "asleep", "--rank", 0, "--step-timeout", 2], timeout=60)
    assert done.returncode == 1
    pattern = rf"error: step 4 did not end within 2 s on {HOST} \(process \d+\), which is at tests/chaos_worker.py:\d+ suffer; .*"
    assert re.fullmatch(pattern, done.stderr.splitlines()[-1]), done.stderr
    assert "suffer" in next(tmp_path.glob("*/faults/rank_0.txt")).read_text()


def env_of(world_size: int, local: int = 1) -> Env:
    return Env(0, world_size, 0, local, torch.device("cpu"), "gloo")


def test_fewer_ranks_take_more_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("KINOFORM_NODES", raising=False)
    config = toy_config(tmp_path, global_batch_size=24)
    assert for_ranks(config, env_of(3)) is config
    limited = toy_config(tmp_path, global_batch_size=24, micro_batch=3)
    assert [for_ranks(limited, env_of(ranks)).train.accumulation for ranks in (8, 6, 4, 3, 2, 1)] == [1, 2, 2, 4, 4, 8]
    assert for_ranks(toy_config(tmp_path, global_batch_size=24, micro_batch=5), env_of(2)).train.accumulation == 3
    monkeypatch.setenv("KINOFORM_NODES", "4")
    with caplog.at_level(logging.WARNING):
        assert for_ranks(config, env_of(2)).train.accumulation == 2
    assert "2 processes: accumulation 2 in place of 1, for micro-batches of 6 samples" in caplog.text
    assert for_ranks(config, env_of(4)) is config
    assert for_ranks(toy_config(tmp_path, global_batch_size=96, accumulation=2), env_of(4, local=4)).train.accumulation == 8
    with pytest.raises(ConfigError, match=r"cannot be cut into 16 rank\(s\)"):  # all nodes: told before the last one comes
        for_ranks(config, env_of(4, local=4))
    with pytest.raises(ConfigError, match=r"cannot be cut into 5 rank\(s\) x 1 .*: use 20 or 25, or 2 or 3 or 4 or 6 rank\(s\)"):
        samples_per_rank(config, env_of(5))


def test_a_run_goes_on_with_fewer_processes_and_the_same_global_batch(tmp_path: Path) -> None:
    whole = command([WORKER, tmp_path / "whole", "--steps", 6], 2)
    assert whole.returncode == 0, whole.stderr
    killed = torchrun([WORKER, str(tmp_path / "cut"), "--steps", "6", "--fault", "killed"], 2)
    assert killed.returncode == 1, killed.stdout
    alone = command([WORKER, tmp_path / "cut", "--steps", 6], 1, KINOFORM_NODES="2")
    assert alone.returncode == 0, alone.stderr
    assert "accumulation 2 in place of 1, for micro-batches of 4 samples" in alone.stdout + alone.stderr
    ends = [json.loads((tmp_path / name / "000-toy/checkpoints/step_0000006/manifest.json").read_text()) for name in ("whole", "cut")]
    assert ends[0]["samples"] == ends[1]["samples"] == 48
    from safetensors.torch import load_file

    weights = [load_file(tmp_path / name / "000-toy/export/model.safetensors") for name in ("whole", "cut")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_lost_node_is_waited_for_where_the_others_cannot_share_the_batch(tmp_path: Path) -> None:
    """Three nodes and batches of three samples: two wait, and go on by themselves once the third is back."""
    results, pace = tmp_path / "results", tmp_path / "pace"
    variables = {"HOST": "127.0.0.1", "PORT": str(free_port()), "NODES": "2:3", "PROCESSES": "1", "LAST_CALL": "3", "BACKOFF": "1"}
    variables |= {"RESULTS": str(results), "PYTHON": sys.executable}
    nodes: list[tuple[subprocess.Popen[bytes], Processes, Path]] = []

    def start() -> None:
        script = ["launch/multi_node.sh", WORKER, str(results), "--batch", "3", "--steps", "20", "--pace", str(pace)]
        processes, log = Processes(), tmp_path / f"{len(nodes)}.txt"
        env = environment(**variables, **{MARK: processes.mark})
        with log.open("w") as output:
            nodes.append((subprocess.Popen(script, cwd=ROOT, env=env, stdout=output, stderr=output), processes, log))

    def said(pattern: str) -> bool:
        return any(re.search(pattern, log.read_text()) for _, _, log in nodes)

    pace.write_text("0.5")
    try:
        for _ in range(3):
            start()
        assert until(lambda: saved(results) >= 2, 120), [log.read_text() for _, _, log in nodes]
        lost, processes, _ = nodes.pop()
        lost.kill()
        processes.kill()
        lost.wait()
        waiting = (
            r"2 node\(s\) with 1 process\(es\) each cannot share the global batch of 3 samples: waiting for more; 1 or 3 node\(s\) can"
        )
        assert until(lambda: said(waiting), 120), [log.read_text() for _, _, log in nodes]
        reached = saved(results)
        start()
        pace.unlink()
        ended = [process.wait(120) for process, _, _ in nodes]
        assert ended == [0, 0, 0], [log.read_text() for _, _, log in nodes]
    finally:
        for process, processes, _ in nodes:
            process.kill()
            processes.kill()
            process.wait()
    assert reached < saved(results) == 20 and said(rf"from step {reached} to 20, 3 process")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's pidfd")
@pytest.mark.parametrize(("restarts", "notices", "ended"), [("0", True, True), ("3", False, True), ("3", True, False)])
def test_a_hung_agent_is_ended_unless_it_may_start_again(restarts: str, notices: bool, ended: bool) -> None:
    """`notices`: the agent has seen that its worker is gone, so it is not the store that it hangs in."""
    worker = "from launch.agent import end_hung_agent, follow_agent; follow_agent(); end_hung_agent(1.0)"
    agent = f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=subprocess.PIPE)\n"
    agent += f"child.stdout.read(){'; child.wait()' if notices else ''}; print('left', flush=True); time.sleep(60)"
    variables = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_MAX_RESTARTS": restarts}
    with subprocess.Popen([sys.executable, "-c", agent], env=environment(**variables), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "left\n"
        try:
            assert process.wait(20 if ended else 3) == -signal.SIGKILL and ended
        except subprocess.TimeoutExpired:
            assert not ended
        finally:
            process.kill()
