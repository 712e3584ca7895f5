"""How long each rank would take for a step if it had not to wait for the others: who holds the run up, and on which host."""

import socket
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.env import Env

_SIDE, _PRODUCTS, _TRIES = 2048, 32, 3
"""Size and number of the matrix products that tell how fast a GPU is, about a millisecond on a recent one; and how often they are done."""


class Ranks:
    """Gathers a row of numbers from every rank, and makes of it what a log line says of them. Every rank calls each method."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self.hosts: list[str] = [socket.gethostname()]
        """Name of each rank's host."""
        self.own: list[float] = []
        """Seconds of a step that each rank took by itself, as `compare` found them last."""
        if env.world_size > 1:
            hosts: list[Any] = [None] * env.world_size
            dist.all_gather_object(hosts, self.hosts[0])
            self.hosts = hosts
        self._probe = Probe(env.device) if env.device.type == "cuda" and env.world_size > 1 else None

    def gather(self, row: list[float]) -> Tensor:
        """(world, len(row)) float64 on the CPU: the rows of all ranks, in one exchange."""
        table = torch.zeros(self._env.world_size, len(row), dtype=torch.float64)
        table[self._env.rank] = torch.tensor(row, dtype=torch.float64)
        table = table.to(self._env.device)
        dist.all_reduce(table)
        return table.cpu()

    def pace(self, busy: float) -> float:
        """What `compare` wants of this rank: `busy` seconds of the host for a step, or the seconds of a GPU's probe."""
        return busy if self._probe is None else self._probe.seconds()

    def compare(self, step: float, waits: list[float], paces: list[float]) -> dict[str, float]:
        """The slowest rank, its own seconds, and how much longer than most ranks' they are, as a share of a step of `step` seconds.

        `waits`: seconds of a step that each rank waited for its samples. On a CPU its own time is that and the time in which its
        thread worked: while it waits for others it does not. What a GPU waits for is hidden from the host; there the speed of a
        fixed piece of work is measured at each log line, and the step is taken to scale with it. (Never run on GPUs yet.)
        """
        if self._env.world_size == 1:
            return {}
        scale = 1.0 if self._probe is None else min((step - wait) / max(pace, 1e-9) for wait, pace in zip(waits, paces, strict=True))
        self.own = [wait + scale * pace for wait, pace in zip(waits, paces, strict=True)]
        slowest = max(range(len(self.own)), key=self.own.__getitem__)
        # Of hundreds of ranks one is always much faster than another: the slowest is held against the middle one.
        spread = (self.own[slowest] - statistics.median_low(self.own)) / max(step, 1e-9)
        return {"time/slowest_rank": float(slowest), "time/slowest_own": self.own[slowest], "time/spread": spread}


class Probe:
    """A fixed piece of work on a GPU. Its two matrices take 16 MiB."""

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=device)
        self._out = torch.empty_like(self._matrix)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(_TRIES + 1)]
        self.seconds()  # loads the kernel

    def seconds(self) -> float:
        """How long it takes now, at best."""
        self._events[0].record()
        for event in self._events[1:]:
            for _ in range(_PRODUCTS):
                torch.mm(self._matrix, self._matrix, out=self._out)
            event.record()
        self._events[-1].synchronize()
        return min(begin.elapsed_time(end) for begin, end in pairwise(self._events)) / 1e3


def busy() -> float:
    """A clock that stands still while this thread waits: seconds that it worked, or would have had a processor been free."""
    try:
        queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        queued = 0  # not Linux
    return time.thread_time() + queued / 1e9
