"""Ends a run when one of its steps does not: the processes then name the rank that all wait for, and leave their stacks."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from engine.config import ParallelConfig
from launch.env import Env
from launch.failures import LostPeer, end_process, in_time, where
from utils.errors import UserError

FAULTS = "faults"
"""Folder of a run with the stacks of the processes that a fault ended, rank_<rank>.txt, and NCCL's last collectives, nccl_rank_<rank>."""

_DUMP_WITHIN = 5.0
"""Seconds after which stacks that cannot be written are given up: the file system may be what hangs."""


class Watch:
    """Watches the steps of this rank from a thread of its own, for the time of a block.

    The first step of a process may take any time, as it compiles kernels and starts the loader; so may what is between the steps:
    checkpoints, evaluations, previews. What rank 0 does there by itself does not count against the others. Ranks that lose each
    other there are found by the timeouts of the collectives.
    """

    def __init__(self, folder: Path, parallel: ParallelConfig, env: Env) -> None:
        self._folder = folder / FAULTS
        self._limit = parallel.step_timeout or _before(parallel.timeout)
        self._env = env
        self._step = 0
        self._armed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._env.peers is not None:
            self._env.peers.before_end = self._dump
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()

    def steps(self, numbers: range) -> Iterator[int]:
        """The steps' numbers, each watched from here to the next, or to `rest`."""
        for number in numbers:
            self._step, self._armed = number, number != numbers.start
            if self._env.peers is not None:
                self._env.peers.step, self._env.peers.resting = number, False
            yield number

    def rest(self) -> None:
        """The step is done, on the device too: what follows until the next one is not watched."""
        self._armed = False
        if self._env.peers is not None:
            self._env.peers.resting = True

    def _run(self) -> None:
        tick = min(1.0, self._limit / 20)
        step, spent, before = 0, 0.0, time.monotonic()
        while not self._closed.wait(tick):
            if not self._armed or step != self._step:
                step, spent = self._step, 0.0
            now = time.monotonic()
            # A process that was stopped for a while, with all others, has not used up its time.
            spent, before = spent + min(now - before, 5 * tick), now
            if self._armed and spent > self._limit:
                if self._env.peers is None or not self._env.peers.rests(0):
                    self._end()
                spent = 0.0

    def _end(self) -> NoReturn:
        line = f"step {self._step + 1} did not end within {self._limit:g} s"
        hint = f"; the stacks of all threads are in {self._folder}"
        if self._env.peers is not None:
            error: UserError = LostPeer(self._env.peers.accuse(line, hint))
        else:
            place, _ = where(threading.main_thread())
            error = UserError(f"{line} on {socket.gethostname()} (process {os.getpid()}), which is at {place}{hint}")
        self._dump()
        end_process(error)

    def _dump(self) -> None:
        """Write the stacks of all threads of this process, and what NCCL did last, if that can be done in time."""
        in_time(self._write_stacks, _DUMP_WITHIN)
        if self._env.device.type == "cuda":
            in_time(self._write_collectives, _DUMP_WITHIN)

    def _write_stacks(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            with (self._folder / f"rank_{self._env.rank}.txt").open("a", encoding="utf-8") as file:
                moment = time.strftime("%F %T")
                file.write(f"{moment} rank {self._env.rank} on {socket.gethostname()}, process {os.getpid()}, step {self._step + 1}\n")
                main = sys._current_frames().get(threading.main_thread().ident or 0)  # faulthandler has it last, and stops at 100 threads
                file.write(f"Main thread:\n{''.join(traceback.format_stack(main))}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            sys.stderr.write(f"rank {self._env.rank}: no stacks in {self._folder} ({error})\n")

    def _write_collectives(self) -> None:
        """What NCCL's flight recorder knows. It would write it down by itself, but only after the collectives' longer timeout."""
        with contextlib.suppress(OSError, RuntimeError, AttributeError):  # another version of torch
            (self._folder / f"nccl_rank_{self._env.rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]


def _before(timeout: float) -> float:
    """Seconds for a step that end soon enough before the collectives' timeout to ask all ranks where they are: NCCL ends the process."""
    return max(timeout - max(20.0, timeout / 5), timeout / 2)
