"""Which sample comes when: a pure function of (seed, position), the same for any number of ranks, workers and restarts.

The endless sequence of training samples is cut into global batches; sample `index = step * global_batch + offset`. An epoch is a
permutation of the set whose last, partial global batch is dropped.
"""

from functools import lru_cache

import numpy as np

from utils.errors import ConfigError
from utils.rng import hash_indices


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Permutation of range(n), int64 (n,), of one epoch: the samples sorted by a hash of (seed, epoch, sample)."""
    order = np.argsort(hash_indices(seed, f"data/order/{epoch}", np.arange(n)), kind="stable")
    order.flags.writeable = False
    return order


class Order:
    """Order of `n` samples in global batches of `global_batch`, each cut over `world` ranks and `accumulation` micro-batches."""

    def __init__(self, n: int, *, seed: int, global_batch: int, accumulation: int = 1, rank: int = 0, world: int = 1) -> None:
        check_batch(n, global_batch, world * accumulation)
        self.n, self.seed, self.global_batch, self.accumulation = n, seed, global_batch, accumulation
        self.rank = rank
        self.micro = global_batch // (world * accumulation)
        self.steps_per_epoch = n // global_batch

    def indices(self, step: int, micro: int) -> np.ndarray:
        """Positions in the endless sequence, int64 (b,), of this rank's micro-batch number `micro` of `step`."""
        first = step * self.global_batch + (self.rank * self.accumulation + micro) * self.micro
        return np.arange(first, first + self.micro, dtype=np.int64)

    def samples(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the endless sequence -> samples of the set, int64 (b,)."""
        steps, offsets = np.divmod(indices, self.global_batch)
        epochs, steps = np.divmod(steps, self.steps_per_epoch)
        out = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permutation(self.seed, int(epoch), self.n)[steps[here] * self.global_batch + offsets[here]]
        return out


def check_batch(n: int, global_batch: int, parts: int) -> None:
    """ConfigError when a global batch does not divide over ranks and micro-batches, or is larger than the set of `n` samples."""
    if global_batch < 1 or global_batch % parts:
        lower, upper = global_batch // parts * parts, (global_batch // parts + 1) * parts
        near = f"{lower} or {upper}" if lower > 0 else f"{upper}"
        raise ConfigError(f"global batch size {global_batch} does not divide over {parts} (ranks x accumulation): use {near}")
    if global_batch > n:
        largest = n // parts * parts
        advice = f"use at most {largest}" if largest else f"it has too few even for {parts} (ranks x accumulation): add clips"
        raise ConfigError(f"global batch size {global_batch} is larger than the shard set of {n} samples: {advice}")
