"""The parts that find out whom a run waits for: the ranks' questions to each other, the words for it, the watch over the steps."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.config import ParallelConfig
from engine.watch import Watch
from launch.accusation import Answer, Place, accusation
from launch.env import Env
from launch.failures import where
from launch.peers import Peers
from tests.distributed import environment, run


def place(rank: int) -> Place:
    return Place(rank, f"h{rank // 2}", 100 + rank, "", 0)


def state(rank: int, step: int | None = 4, waits: bool = True) -> Answer:
    return Answer(place(rank), state={"step": step, "at": f"f.py:{rank} g", "waits": waits})


def test_who_is_accused() -> None:
    gone, silent, far = (Answer(place(2 + k), trouble) for k, trouble in enumerate(("gone", "silent", "unreachable")))
    assert accusation([state(0), gone]) == "rank 2 on h1 (process 102) is gone: killed, or crashed"
    both = accusation([far, state(0), gone, silent])
    assert [part.split(" on ")[0] for part in both.split("; ")] == ["rank 2", "rank 3", "rank 4"]
    many = accusation([Answer(place(rank), "unreachable") for rank in range(9)])
    assert many.startswith("rank 0 on h0") and "and 5 more are out of reach" in many and "rank 4" not in many
    late = accusation([state(0), state(1, step=3), state(2)])
    assert late == "all wait for rank 1 on h0 (process 101), which is in step 4 at f.py:1 g"
    assert accusation([state(0), state(1), state(2, waits=False)]).startswith("all wait for rank 2 ")
    assert "a link between them" in accusation([state(0), state(1)])
    assert "all wait for rank 1" in accusation([state(0, step=0), state(1, step=None)])


def test_where_a_thread_is() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    found, waits = where(thread)
    done.set()
    assert not waits and "threading.py" in found
    assert where(threading.current_thread())[0].startswith("launch/failures.py")


def strangers_and_children(env: Env) -> list[str]:
    """A stranger is not answered, whatever it sends; a child of a rank does not keep its connections open."""
    peers = env.peers
    assert isinstance(peers, Peers)
    own, answers = peers._own, []
    for sent in (b"wrong state\n", b"\xc3\xa9\n", b"\xff\xfe\n", f"{peers._secret} verdict [\n".encode()):
        with socket.create_connection((own.address, own.port), timeout=5) as stranger:
            stranger.sendall(sent)
            answers.append(stranger.recv(100).decode())
    deadline = time.monotonic() + 20
    while peers._followed is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        os._exit(0 if peers._listener.fileno() == -1 and peers._followed is not None and peers._followed.fileno() == -1 else 1)
    _, status = os.waitpid(child, 0)
    refused = []
    accept = peers._accept
    peers._accept = lambda: refused.append(1) or (_ for _ in ()).throw(OSError(24, "too many open files"))  # type: ignore[func-returns-value, method-assign]
    with socket.create_connection((own.address, own.port), timeout=5) as visitor:
        visitor.sendall(f"{peers._secret} state\n".encode())
        while len(refused) < 2:
            time.sleep(0.01)
        peers._accept = accept  # type: ignore[method-assign]
        answers.append(str(json.loads(visitor.recv(1000))["step"]))
    torch.distributed.barrier()
    found = peers._ask(peers._next)
    return [*answers, str(status), found.trouble, str(found.state["step"])]


def test_only_ranks_are_answered_and_forks_hold_nothing() -> None:
    assert run(strangers_and_children) == [["", "", "", "", "None", "0", "", "None"]] * 2


def waits_and_hangs(env: Env, folder: str) -> list[object]:
    """What rank 0 does by itself between the steps does not count; answers that are none do not stop the watch."""
    assert env.peers is not None
    watch = Watch(Path(folder), ParallelConfig(step_timeout=0.4), env)
    ended: list[str] = []
    watch._end = lambda: ended.append("end")  # type: ignore[assignment, method-assign, return-value]
    with watch:
        for step in watch.steps(range(3)):
            if step == 1 and env.rank == 0:
                watch.rest()
                time.sleep(2)  # others wait in the next meeting, within a step
            if step == 1:
                torch.distributed.barrier()
                before = len(ended)
            if step == 2:
                deadline = time.monotonic() + 20
                while env.rank == 1 and not ended and time.monotonic() < deadline:
                    time.sleep(0.05)
                torch.distributed.barrier()
    return [before, bool(ended)]


def test_work_of_rank_0_between_steps_is_not_counted_against_the_others(tmp_path: Path) -> None:
    results = run(waits_and_hangs, folder=str(tmp_path))
    assert results[1] == [0, True] and results[0][0] == 0


def test_the_watch_ends_a_process_whatever_fails(tmp_path: Path) -> None:
    """Questions that raise, a terminal that raises or blocks, and no folder for the stacks."""
    script = f"""
import sys, threading, time
from pathlib import Path
import torch
from engine.config import ParallelConfig
from engine.watch import Watch
from launch.env import Env
from launch.failures import LostPeer, end_process
import dataclasses, os
class Closed:
    def write(self, text): raise BrokenPipeError("nobody reads this")
    def flush(self): raise BrokenPipeError("nobody reads this")
class Blocked:
    def write(self, text): time.sleep(3600)
    flush = write
class Peers:
    def rests(self, rank): return False
    def accuse(self, line, hint): return line
    def __setattr__(self, name, value): pass
sys.stderr = {{"closed": Closed, "blocked": Blocked}}[sys.argv[1]]()
env = dataclasses.replace(Env.single(), peers=Peers())
with Watch(Path({str(tmp_path / "missing" / "run")!r}), ParallelConfig(step_timeout=0.2), env) as watch:
    for step in watch.steps(range(3)):
        if step == 1:
            time.sleep(3600)
"""
    cases = [subprocess.Popen([sys.executable, "-c", script, case], env=environment()) for case in ("closed", "blocked")]
    try:
        assert [case.wait(60) for case in cases] == [1, 1]
    finally:
        for case in cases:
            case.kill()


def test_what_nccl_did_last_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    env = Env(3, 4, 0, 1, torch.device("cuda"), "gloo")
    Watch(tmp_path, ParallelConfig(), env)._dump()
    assert (tmp_path / "faults/nccl_rank_3").read_bytes() == b"trace"
    assert "test_what_nccl_did_last" in (tmp_path / "faults/rank_3.txt").read_text()


@pytest.mark.parametrize(("timeout", "limit"), [(600, 480), (100, 80), (60, 40), (15, 7.5)])
def test_a_step_ends_before_the_collectives_do(tmp_path: Path, timeout: float, limit: float) -> None:
    assert Watch(tmp_path, ParallelConfig(timeout=timeout), Env.single())._limit == limit
