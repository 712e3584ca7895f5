"""Kernel distance of two sets of feature vectors (KID of images, KVD of videos): unbiased for sets of any size."""

import numpy as np
import torch
from torch import Tensor

from utils.rng import derive_seed

_CHUNK = 1024


def kernel_distance(real: Tensor, generated: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over subsets of MMD^2 with the kernel (x y / d + 1)^3, of rows (n, d) and (m, d).

    A subset has `size` vectors of each side, drawn without replacement; of smaller sides as many as the smaller has, and where both have
    no more there is one subset. ValueError for fewer than two vectors.
    """
    least = min(len(real), len(generated))
    if least < 2:
        raise ValueError(f"{least} feature vectors: a kernel distance needs at least 2")
    size = min(size, least)
    count = 1 if size == len(real) == len(generated) else subsets
    rng = np.random.default_rng(derive_seed(seed, "kernel subsets"))
    weights = [torch.zeros(count, len(rows), dtype=torch.float64) for rows in (real, generated)]
    for number in range(count):
        for side in weights:
            side[number, torch.from_numpy(rng.permutation(side.shape[1])[:size])] = 1
    found = weighted_distances(real, generated, weights[0], weights[1])
    return float(found.mean()), float(found.std(correction=0))


def weighted_distances(real: Tensor, generated: Tensor, real_weights: Tensor, generated_weights: Tensor) -> Tensor:
    """MMD^2 of each row of weights, (b, n) and (b, m): how often each vector is in the set. (b,) float64.

    A vector and its copies are no pair: copies of one would look alike. The kernel is worked out in parts, never as a whole.
    """
    one, two = real.double(), generated.double()
    return (
        _mean_kernel(one, one, real_weights, real_weights, paired=True)
        + _mean_kernel(two, two, generated_weights, generated_weights, paired=True)
        - 2 * _mean_kernel(one, two, real_weights, generated_weights, paired=False)
    )


def _mean_kernel(first: Tensor, second: Tensor, weights: Tensor, others: Tensor, *, paired: bool) -> Tensor:
    """Weighted mean of the kernel over pairs; `paired`: both are one set, without pairs of a vector with itself."""
    total = weights.new_zeros(len(weights))
    for start in range(0, len(first), _CHUNK):
        kernel = (first[start : start + _CHUNK] @ second.T / first.shape[1] + 1) ** 3
        if paired:
            kernel.diagonal(offset=start).zero_()
        total += (weights[:, start : start + _CHUNK] * (others @ kernel.T)).sum(dim=1)
    pairs = weights.sum(dim=1) * others.sum(dim=1)
    return total / (pairs - weights.square().sum(dim=1) if paired else pairs)
