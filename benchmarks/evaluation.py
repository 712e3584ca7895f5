"""From features of clips to the Frechet distance: sums in one pass and symmetric eigenvalues, beside all features and a matrix root.

Our sums are those of evaluate.py, which sums up two halves of a side (its noise floor needs them) and joins them for the distance, and
those of `--score-every` and of reconstructions, which do without halves. The other way is that of most published scripts: collect the
features of both sides, numpy.cov, scipy.linalg.sqrtm. Time is that of both sides and the distance, and of the distance alone, for
features that are there: processor time of one thread, and time by the clock on all cores, as a user runs it; memory that of a process
which makes features batch by batch, 400 numbers a clip as of I3D, 1408 as of VideoMAE. The values must agree.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from benchmarks.common import CLOCKS, alternate, machine
from evaluation.features import halves
from metrics.frechet import Moments, frechet_distance, update_halves

BATCH = 32
AGREE = 1e-6
"""Relative difference of the values at most."""
REST = 0.1
"""Seconds after which threads of BLAS that have no more work sleep; until then they keep cores busy."""


def batches(clips: int, dim: int, seed: int) -> Iterator[Tensor]:
    """Features of so many clips in batches: variances that fall as 30 / k along axes of their own, and a mean that the seed moves."""
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(2))).Q
    mixing = (30 / torch.arange(1, dim + 1)).sqrt()[:, None] * axes
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, clips, BATCH):
        yield torch.randn(min(BATCH, clips - start), dim, generator=generator) @ mixing + 0.1 * seed


@dataclass(frozen=True)
class Way:
    """How features become a distance."""

    summarise: Callable[[Iterable[Tensor], int], Any]
    """Of one side's batches, and of how many clips they are."""
    distance: Callable[[Any, Any], float]

    def __call__(self, sides: Iterable[Iterable[Tensor]], clips: int) -> float:
        one, two = (self.summarise(side, clips) for side in sides)
        return self.distance(one, two)


def halved(side: Iterable[Tensor], clips: int) -> Moments:
    """As `evaluation.features` sums up the blocks of a side."""
    chosen, start, parts = halves(clips, 0), 0, ()
    for rows in side:
        parts = parts or (Moments(rows.shape[1]), Moments(rows.shape[1]))
        update_halves(parts, rows, chosen[start : start + len(rows)])
        start += len(rows)
    return Moments.union(parts)


def whole(side: Iterable[Tensor], clips: int) -> Moments:
    """As `evaluation.paired` sums up batches of reconstructions."""
    found: Moments | None = None
    for rows in side:
        found = found or Moments(rows.shape[1])
        found.update(rows)
    assert found is not None and found.n == clips
    return found


def collected(side: Iterable[Tensor], clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features that are all there."""
    features = np.concatenate([rows.double().numpy() for rows in side])
    assert len(features) == clips
    return features.mean(axis=0), np.cov(features, rowvar=False)


def root_distance(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> float:
    """By the root of the product of both covariances."""
    root = linalg.sqrtm(one[1] @ two[1])
    return float(np.square(one[0] - two[0]).sum() + np.trace(one[1] + two[1] - 2 * np.real(root)))


BASELINE = "all features, sqrtm"
WAYS = {
    "one pass in halves, eigenvalues": Way(halved, frechet_distance),
    "one pass, eigenvalues": Way(whole, frechet_distance),
    BASELINE: Way(collected, root_distance),
}


def report(clips: int, dim: int, rounds: int, threads: int) -> None:
    """Prints value and time of both ways, as a whole and of the distance alone: processor time of one thread, or time by the clock."""
    clock, rest = ("cpu", 0.0) if threads == 1 else ("wall", REST)
    sides = [list(batches(clips, dim, seed)) for seed in (0, 1)]
    sums = {name: [way.summarise(side, clips) for side in sides] for name, way in WAYS.items()}
    values = {name: way.distance(*sums[name]) for name, way in WAYS.items()}
    apart = max(abs(value - values[BASELINE]) / abs(values[BASELINE]) for value in values.values())
    assert apart <= AGREE, values
    print(f"{clips} clips a side, {dim} numbers each, threads {threads}, {clock} time")
    print(f"  distance {values[BASELINE]:.9f}, apart {apart:.1e} of it")
    work: dict[str, Callable[[], object]] = {f"{name}: all": partial(way, sides, clips) for name, way in WAYS.items()}
    work |= {f"{name}: distance": partial(way.distance, *sums[name]) for name, way in WAYS.items()}
    taken = alternate(work, rounds, torch.device("cpu"), CLOCKS[clock], rest)
    for name, time in taken.items():
        ratio = taken[f"{BASELINE}: {name.rpartition(' ')[2]}"] / time
        print(f"  {name:<44}{time * 1e3:>9.1f} ms (ratio {ratio:.3f})", flush=True)


def separately(threads: int, *options: str) -> subprocess.CompletedProcess[str]:
    """This benchmark in a process with so many threads: NumPy and SciPy read their number when they are loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    line = [sys.executable, "-m", "benchmarks.evaluation", *options]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | dict.fromkeys(names, str(threads)))


def peaks(dim: int, clips: list[int]) -> None:
    """Prints the memory that each way needs for so many clips, each in a process of its own."""
    for name in WAYS:
        found = [
            json.loads(separately(1, "--peak", name, "--dims", str(dim), "--clips", str(count)).stdout.splitlines()[-1]) for count in clips
        ]
        told = ", ".join(f"{count} clips {growth / 2**20:.0f} MiB" for count, growth in zip(clips, found, strict=True))
        print(f"  memory, {name:<34}{told}", flush=True)


def growth(name: str, dim: int, clips: int) -> int:
    """Bytes that this process grows by at most, once libraries are loaded and have worked."""
    WAYS[name]([list(batches(64, 16, seed)) for seed in (0, 1)], 64)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    WAYS[name]((batches(clips, dim, seed) for seed in (0, 1)), clips)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2048, help="of each side (default 2048)")
    parser.add_argument("--dims", type=int, nargs="+", default=[400, 1408], help="numbers of a feature (default 400 1408)")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is printed (default 7)")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)  # of a process that measures its memory
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)  # of a process that measures time
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(growth(args.peak, args.dims[0], args.clips)))
        return
    if args.threads:
        report(args.clips, args.dims[0], args.rounds, args.threads)
        return
    print(machine(torch.device("cpu")))
    cores = len(os.sched_getaffinity(0))
    for dim in args.dims:
        for threads in sorted({1, cores}):
            shared = ("--clips", str(args.clips), "--dims", str(dim), "--rounds", str(args.rounds))
            print(separately(threads, "--threads", str(threads), *shared).stdout, end="", flush=True)
        peaks(dim, [args.clips, 8 * args.clips])


if __name__ == "__main__":
    main()
