"""What a log line says: sums on the device and clocks on the host; the host waits for the device at log lines alone."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.feed import Feed
from engine.ranks import Ranks, busy
from engine.tally import Sums
from engine.task import BatchSource, Counting
from launch.env import Env

GIB = 2**30


_TOGETHER = 64
"""Turns that are added up at once, at most: a long way between log lines must not gather tensors without end."""


class Meter:
    """Collects the turns of the steps since the last log line.

    Keys of a line: `loss` (the first network's) and `loss/<network>` (the others'), `train/<metric>`, `lr/<network>`,
    `grad_norm/<network>` (before clipping; mean over the steps that were not skipped); `time/step` in seconds, `time/data_wait` as
    a share of it (the worst rank's), `clips_per_s`, `memory_gib` (peak, the worst rank's), `mfu`, `skipped`, `eta_s`; of several
    ranks `time/slowest_rank`, `time/slowest_own` and `time/spread`, as `Ranks.compare` has them.
    """

    def __init__(
        self,
        env: Env,
        feed: Feed,
        total: int,
        main_network: str,
        flops: Mapping[str, float | None],
        peak: float | None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """`rest`: called once the device has done what it was given, before something that is no step (`Watch.rest`)."""
        self._env = env
        self._feed = feed
        self._total = total
        self._main = main_network
        self._flops = flops
        self._peak = peak
        self._rest = rest
        self.ranks = Ranks(env)
        self._sums: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        """Phase and names of its metrics -> their sums. A loss may get further terms at any step, such as a discriminator's."""
        self._turns: dict[tuple[str, tuple[str, ...]], list[tuple[Sums, Tensor, Tensor]]] = {}
        """Turns that wait to be added to the sums: totals, gradient norm, whether it was good."""
        self._turn_samples = 0
        self._rates: dict[str, float] = {}
        self._warm = False
        self._restart()

    def _restart(self) -> None:
        self._steps = 0
        self._samples = 0
        self._work: float | None = 0.0
        self._paused = 0.0
        self._feed.waited = self._feed.worked = 0.0
        self._started, self._busy = time.perf_counter(), busy()

    def turn(self, phase: str, sums: Sums, norm: Tensor, good: Tensor, rate: float, samples: int) -> None:
        """Add one optimiser turn of `samples`; one that was not good does not count. `norm`: of the gradient of the sum over `samples`."""
        key = phase, tuple(sums.names)
        turns = self._turns.setdefault(key, [])
        turns.append((sums, norm, good))
        if len(turns) == _TOGETHER:
            self._add_up(key, samples)
        self._rates[phase], self._turn_samples = rate, samples
        flops = self._flops.get(phase)
        self._work = None if flops is None or self._work is None else self._work + flops * samples

    def _add_up(self, key: tuple[str, tuple[str, ...]], samples: int) -> None:
        """Add the turns that wait: many at once, as each operation on small tensors costs a step some hundredths of a millisecond."""
        sums, norms, good = zip(*self._turns[key], strict=True)
        n = len(key[1]) + 1
        values = torch.stack([turn.packed[: 2 * n] for turn in sums])
        norm = torch.stack(norms).double() * samples / values[:, n]
        values = torch.cat([values, norm[:, None], torch.ones_like(values[:, :1])], dim=1)
        values = values.masked_fill(~torch.stack(good)[:, None], 0.0).sum(dim=0)  # torch.where would copy the number to the GPU and wait
        self._sums[key] = self._sums[key] + values if key in self._sums else values
        self._turns[key].clear()

    def end_step(self, samples: int, log_every: int) -> None:
        """Count a step of `samples` (over all ranks)."""
        self._steps += 1
        self._samples += samples
        if not self._warm:
            self._warm = True
            if log_every > 1:
                # The first step compiles kernels and starts the loader: not what a step takes.
                self._drain()
                self._restart()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block is no step time, nor watched as one: checkpoints, evaluations, previews."""
        self._drain()
        self._rest()
        started, worked = time.perf_counter(), busy()
        yield
        self._drain()
        self._paused += time.perf_counter() - started
        self._busy += busy() - worked

    def read(self, step: int, skipped: int) -> dict[str, float]:
        """Values of the log line after `step` steps, and a fresh start. Every rank calls it."""
        for key in [key for key, turns in self._turns.items() if turns]:
            self._add_up(key, self._turn_samples)
        numbers = torch.cat([*self._sums.values()]).tolist()
        seconds = time.perf_counter() - self._started - self._paused
        line = self._means(numbers) | {f"lr/{phase}": self._rates[phase] for phase, _ in self._sums} | self._pace(step, seconds)
        line["skipped"] = float(skipped)
        self._sums.clear()
        self._restart()
        return line

    def _means(self, numbers: list[float]) -> dict[str, float]:
        """Loss, metrics and gradient norm of each phase, from the sums in their order; a metric over the steps that had it."""
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for (phase, names), sums in self._sums.items():
            own, numbers = numbers[: len(sums)], numbers[len(sums) :]
            keys = ["loss" if phase == self._main else f"loss/{phase}", *(f"train/{name}" for name in names), f"grad_norm/{phase}"]
            n = len(names) + 1
            for key, value, count in zip(keys, [*own[:n], own[-2]], [*own[n : 2 * n], own[-1]], strict=True):
                total, counted = found.get((phase, key), (0.0, 0.0))
                found[phase, key] = total + value, counted + count
        return {key: total / count for (_, key), (total, count) in found.items() if count > 0}

    def _pace(self, step: int, seconds: float) -> dict[str, float]:
        steps = max(self._steps, 1)
        waited, worked = self._feed.waited / steps, (busy() - self._busy - self._feed.worked) / steps
        table = self.ranks.gather([waited, self.ranks.pace(worked), peak_memory(self._env.device) / GIB])
        waits, paces, memory = table.T.tolist()
        step_time = seconds / steps
        pace = {
            "time/step": step_time,
            "time/data_wait": max(waits) / max(step_time, 1e-9),
            "clips_per_s": self._samples / max(seconds, 1e-9),
            "memory_gib": max(memory),
            "eta_s": step_time * (self._total - step),
        }
        if self._peak and self._work:
            pace["mfu"] = self._work / (seconds * self._peak * self._env.world_size)
        return pace | self.ranks.compare(step_time, waits, paces)

    def _drain(self) -> None:
        if self._env.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # not that of a checkpoint's copy


def counted(source: BatchSource) -> dict[str, float]:
    """What a source has counted, over all ranks; every rank calls it. Nothing is exchanged when the source counts nothing."""
    own = source.counters() if isinstance(source, Counting) else {}
    if not own:
        return {}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    numbers = {name: [part[name] for part in ranks] for name in own}
    return {
        name: float(len(frozenset().union(*parts)) if isinstance(parts[0], frozenset) else sum(parts)) for name, parts in numbers.items()
    }


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the last call on a GPU; of the process since it began on a CPU."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
