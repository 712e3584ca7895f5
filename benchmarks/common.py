"""What the benchmarks share: the machine in words, a clock that waits for the device, rounds that alternate between variants."""

import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from launch.env import Env, distributed

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: processor time of this process over all its threads; with one thread, the wall time of a machine that does nothing else."""

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
    """Seconds on a clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def seconds(work: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds that `work` takes."""
    started = now(device, clock)
    work()
    return now(device, clock) - started


def alternate(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, clock: Clock) -> dict[str, float]:
    """Median seconds of each variant over `rounds`; the variants take turns, so that a busy machine slows all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            taken[name].append(seconds(work, device, clock))
    return {name: statistics.median(values) for name, values in taken.items()}
