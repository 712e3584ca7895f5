"""What the benchmarks share: the machine in words, a clock that waits for the device, rounds that alternate between variants."""

import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import EmaConfig, OptimConfig, ParallelConfig, RunConfig
from engine.task import Network
from engine.team import Team
from launch.env import Env, distributed

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: processor time of this process over all its threads; with one thread, the wall time of a machine that does nothing else."""

VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain fp32": (False, {"precision": "fp32", "compile": "off"}),
    "plain bf16": (False, {"precision": "bf16", "compile": "off"}),
    "eager bf16": (True, {"precision": "bf16", "compile": "off"}),
    "compiled bf16": (True, {"precision": "bf16", "compile": "on"}),
}
"""Name -> whether the network is ours (or the one written down plainly), and how it is trained."""
BASELINE, OURS = "plain bf16", "eager bf16"

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine(device: torch.device) -> str:
    """The device, the CPU with what it can do in bf16, and the versions, in one line."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    known = {name.strip(): value.strip() for name, value in fields.items()}
    able = [flag for flag in _FLAGS if flag in known.get("flags", "").split()]
    name = known.get("model name", platform.processor() or platform.machine())
    parts = [f"{name}, {os.cpu_count()} cores ({', '.join(able) or 'no vector flags known'}), {torch.get_num_threads()} threads"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return "; ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


@contextmanager
def processes() -> Iterator[Env]:
    """The process group, as in training; a signal ends the process at once, there being nothing to save."""
    with distributed(600) as env:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield env


def now(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds on a clock, once the device has done all it was given; not what runs beside it in other streams."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return clock()


def seconds(work: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds that `work` takes."""
    started = now(device, clock)
    work()
    return now(device, clock) - started


def alternate(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, clock: Clock, rest: float = 0.0
) -> dict[str, float]:
    """Median seconds of each variant over `rounds`; the variants take turns, so that a busy machine slows all of them alike.

    `rest`: seconds between them, for threads of the one before that go on waiting for work.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            time.sleep(rest)
            taken[name].append(seconds(work, device, clock))
    return {name: statistics.median(values) for name, values in taken.items()}


class StepTrainer:
    """One variant of a network, ready to be stepped: as in training, with a loss that has its own batch on the device."""

    def __init__(
        self,
        module: nn.Module,
        is_ours: bool,
        how: Mapping[str, Any],
        loss: Callable[[nn.Module], Tensor],
        env: Env,
        optim: OptimConfig | None = None,
        ema: EmaConfig | None = None,
    ) -> None:
        """`is_ours`: the network has units; `how`: settings of ParallelConfig."""
        units: Callable[[Any], list[nn.Module]] | None = (lambda network: network.units()) if is_ours else None
        network = Network(module, optim=optim or OptimConfig(), ema=ema, units=units)
        self._team = Team({"model": network}, RunConfig(parallel=ParallelConfig(mode="ddp", **how)), env)
        self._loss, self._true = loss, torch.tensor(True, device=env.device)

    def step(self) -> None:
        """Forward, backward, norm, clipping, AdamW and moving average."""
        with self._team.turn("model") as modules:
            self._team.synchronise("model", last=True)
            with self._team.autocast():
                loss = self._loss(modules["model"])
            loss.backward()
        norm = self._team.gradient_norm("model")
        self._team.step("model", 0, 1, norm, torch.ones_like(norm), self._true)
        self._team.average(1)

    def steps(self, count: int) -> None:
        """Several of them."""
        for _ in range(count):
            self.step()


def ratio_lines(
    medians: Mapping[str, float], steps: int, batch: int, first: Mapping[str, float], notes: Mapping[str, str]
) -> Iterator[str]:
    """A line for each variant: time of a step, clips/s, how it compares with the baseline, its note, seconds of its first step."""
    for name, median in medians.items():
        step = median / steps
        ratio = f"   {medians[BASELINE] / median:.2f} times as fast as {BASELINE}" if BASELINE in medians else ""
        speed = f"{step * 1e3:>9.1f} ms/step {batch / step:>8.2f} clips/s"
        yield f"  {name:<14}{speed}{ratio}{notes.get(name, '')}   (first step {first[name]:.1f} s)"
