"""How far figures of sets would be elsewhere: on other videos of the same kind (intervals), and with ever more of them (limit)."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from metrics.frechet import Moments, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import weighted_distances
from utils.rng import derive_seed

LEVEL = 0.95
LEAST_SETS = 20
"""Resampled sets that an interval can come from: of fewer its ends are hardly more than the extremes of a few values."""
FRACTIONS = (0.25, 0.375, 0.5, 0.75, 1.0)
"""Sizes of subsets that the limit is found from, of the smaller side."""
DRAWS = 4


def interval(value: float, resampled: list[float]) -> tuple[float, float]:
    """Where 95 % of the values of other sets of this size are expected: the value, and how far resampled ones lie from their mean.

    Their mean itself is no use: a resampled set has copies, so its Frechet distance is larger and its inception score smaller, as of a
    smaller set.
    """
    found = np.asarray(resampled)
    low, high = np.quantile(found - found.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value + float(low), value + float(high)


def resampled_counts(count: int, total: int, seed: int, stream: str) -> np.ndarray:
    """(count, total): how often each of `total` videos is drawn, with replacement, in each of `count` sets of as many."""
    return np.random.default_rng(derive_seed(seed, stream)).multinomial(total, np.full(total, 1 / total), size=count)


def bootstrap_frechet(
    real: Tensor,
    generated: Tensor,
    count: int,
    seed: int,
    *,
    unbiased: bool = True,
    paired: bool = False,
    after_each: Callable[[], object] = lambda: None,
) -> list[float]:
    """Distances of sets drawn with replacement from rows (videos, k, dim); all k rows of a video are drawn together.

    `paired`: each video of one side with that of the same place in the other, which was made of it. `after_each`: is called after each
    set, of which one of many wide rows takes seconds.
    """
    streams = ("real", "real" if paired else "generated")
    draws = [resampled_counts(count, len(rows), seed, stream) for rows, stream in zip((real, generated), streams, strict=True)]
    found = []
    for picked in zip(*draws, strict=True):
        one, two = (_moments(rows.repeat_interleave(torch.from_numpy(n), dim=0)) for rows, n in zip((real, generated), picked, strict=True))
        found.append(frechet_distance(one, two, unbiased=unbiased))
        after_each()
    return found


def bootstrap_kernel(real: Tensor, generated: Tensor, count: int, seed: int) -> list[float]:
    """Kernel distances of whole sets drawn with replacement from rows (n, dim)."""
    draws = [resampled_counts(count, len(rows), seed, stream) for rows, stream in ((real, "real"), (generated, "generated"))]
    found: list[float] = weighted_distances(real, generated, *(torch.from_numpy(draw).double() for draw in draws)).tolist()
    return found


def bootstrap_score(probs: Tensor, splits: int, count: int, seed: int, shuffle_seed: int | None = None) -> list[float]:
    """Inception scores of rows (n, classes) drawn with replacement within each split."""
    if shuffle_seed is not None:
        probs = probs[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(len(probs)))]
    rng = np.random.default_rng(derive_seed(seed, "score"))
    bounds = list(pairwise([number * len(probs) // splits for number in range(splits + 1)]))
    found = []
    for _ in range(count):
        picked = np.concatenate([rng.integers(start, end, end - start) for start, end in bounds])
        found.append(inception_score(probs[torch.from_numpy(picked)], splits)[0])
    return found


def frechet_limit(real: Tensor, generated: Tensor, seed: int, *, unbiased: bool = True) -> tuple[float, dict[int, float]]:
    """The distance of sets without end, and the mean distance of subsets by their size, of rows (videos, k, dim).

    The distance of two finite sets is too large by nearly a constant over their size: a line in 1 / size through those of subsets, drawn
    without replacement, meets 1 / size = 0 there. ValueError for fewer than 8 videos.
    """
    least = min(len(real), len(generated))
    if least < 8:
        raise ValueError(f"{least} videos: the limit needs at least 8")
    rng = np.random.default_rng(derive_seed(seed, "limit"))
    sizes = [round(least * fraction) for fraction in FRACTIONS]
    found = {size: [_distance_of_subsets(real, generated, size, rng, unbiased) for _ in range(DRAWS)] for size in sizes}
    inverse = np.repeat([1 / size for size in sizes], DRAWS)
    slope_and_limit = np.polyfit(inverse, np.concatenate(list(found.values())), 1)
    return float(slope_and_limit[1]), {size: float(np.mean(values)) for size, values in found.items()}


def _distance_of_subsets(real: Tensor, generated: Tensor, size: int, rng: np.random.Generator, unbiased: bool) -> float:
    one, two = (_moments(rows[torch.from_numpy(rng.permutation(len(rows))[:size])]) for rows in (real, generated))
    return frechet_distance(one, two, unbiased=unbiased)


def _moments(rows: Tensor) -> Moments:
    """Of rows (videos, k, dim)."""
    found = Moments(rows.shape[-1])
    found.update(rows.flatten(0, 1))
    return found
