"""Which sample comes when: a pure function of (seed, position), the same for any number of ranks, workers and restarts.

The endless sequence of training samples is cut into global batches; sample `index = step * global_batch + offset`. An epoch of one
set is a permutation whose last, partial global batch is dropped. Shuffles are `full`, or by `blocks` where random access is dear:
shards come in random order, samples are shuffled inside a window of some shards, and a global batch is sorted by shard.
"""

from itertools import pairwise
from typing import Protocol

import numpy as np

from utils.errors import ConfigError
from utils.rng import hash_indices

STREAM = "data/order"
NEAR = 16
"""Substitutes that are looked for in the window of a bad sample, before the whole set."""


def permutation(seed: int, epoch: int, n: int, stream: str = STREAM) -> np.ndarray:
    """Permutation of range(n), int64 (n,), of one epoch: the samples sorted by a hash of (seed, epoch, sample)."""
    return np.argsort(hash_indices(seed, f"{stream}/{epoch}", np.arange(n)), kind="stable")


def block_permutation(seed: int, epoch: int, shard: np.ndarray, window: int, stream: str = STREAM) -> tuple[np.ndarray, np.ndarray]:
    """(permutation, bounds): shards in random order, cut into windows of `window`, the samples of each window shuffled.

    `shard` (n,) is each sample's shard; window w holds the places [bounds[w], bounds[w + 1]) of the permutation.
    """
    present = np.flatnonzero(np.bincount(shard))  # shards without samples have no place
    place = np.empty(present[-1] + 1, dtype=np.int64)
    place[present[permutation(seed, epoch, len(present), f"{stream}/shards")]] = np.arange(len(present))
    group = place[shard] // window
    order = np.argsort(group.astype(np.uint16) if group.max() < 1 << 16 else group, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(group))])
    # Window by window: a fraction of what one sort of all samples takes.
    for low, high in pairwise(bounds.tolist()):
        part = order[low:high]
        order[low:high] = part[np.argsort(hash_indices(seed, f"{stream}/{epoch}", part), kind="stable")]
    return order, bounds


class Sequence(Protocol):
    """An endless sequence of samples, cut into global batches."""

    n: int
    """Samples of an epoch."""

    def samples(self, indices: np.ndarray, global_batch: int) -> np.ndarray:
        """Samples, int64 (b,), at positions of the sequence of global batches."""

    def substitute(self, index: int, global_batch: int, attempt: int) -> int:
        """Another sample for the position `index`, whose own is bad, and so are those of the attempts before."""

    def beside(self, indices: np.ndarray, global_batch: int, draws: np.ndarray, *, everywhere: bool = False) -> np.ndarray:
        """Samples, int64 (b,), chosen by `draws` (uint64) from those near each position (the window of a shuffle by blocks), or from
        everywhere; of the same set where there are several in proportion."""


class Shuffled:
    """One set of samples, shuffled anew each epoch. With a `window` of shards: by blocks."""

    def __init__(self, n: int, *, seed: int, shard: np.ndarray | None = None, window: int = 0, stream: str = STREAM) -> None:
        """`shard` (n,): each sample's shard, needed with `window`."""
        self.n, self.seed, self.stream = n, seed, stream
        self._shard, self._window = shard, window
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Permutation of an epoch and the bounds of its windows."""
        found = self._kept.get(number)
        if found is None:
            if self._window:
                assert self._shard is not None
                found = block_permutation(self.seed, number, self._shard, self._window, self.stream)
            else:
                found = permutation(self.seed, number, self.n, self.stream), np.array([0, self.n])
            # Threads share this: the dictionary is replaced, never changed. A step meets two epochs at most.
            self._kept = dict(list(self._kept.items())[-1:]) | {number: found}
        return found

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Samples at positions of epoch after epoch, nothing dropped."""
        epochs, places = np.divmod(positions, self.n)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self.epoch(int(epoch))[0][places[here]]
        return out

    def near(self, position: int, index: int, attempt: int) -> int:
        """A sample drawn by (seed, index, attempt) from the window of the one at `position`; in the end from the whole set."""
        draws = hash_indices(self.seed, f"{self.stream}/substitute/{attempt}", np.array([index]))
        return int(self.around(np.array([position]), draws, everywhere=attempt >= NEAR)[0])

    def around(self, positions: np.ndarray, draws: np.ndarray, *, everywhere: bool = False) -> np.ndarray:
        """Samples, int64 (b,), chosen by `draws` (uint64) from the windows of those at `positions`, or from everywhere."""
        epochs, places = np.divmod(positions, self.n)
        out = np.empty_like(places)
        for number in np.unique(epochs):
            here = epochs == number
            order, bounds = self.epoch(int(number))
            low, high = np.zeros(int(here.sum()), np.int64), np.int64(self.n)
            if not everywhere:
                window = np.searchsorted(bounds, places[here], side="right")
                low, high = bounds[window - 1], bounds[window]
            out[here] = order[low + (draws[here] % (high - low).astype(np.uint64)).astype(np.int64)]
        return out

    def samples(self, indices: np.ndarray, global_batch: int) -> np.ndarray:
        """As `Sequence` says; the last, partial global batch of an epoch is dropped."""
        return self.at(self._positions(indices, global_batch))

    def substitute(self, index: int, global_batch: int, attempt: int) -> int:
        """As `Sequence` says; near the bad sample, so that no other shard must be fetched."""
        return self.near(int(self._positions(np.array([index]), global_batch)[0]), index, attempt)

    def beside(self, indices: np.ndarray, global_batch: int, draws: np.ndarray, *, everywhere: bool = False) -> np.ndarray:
        """As `Sequence` says."""
        return self.around(self._positions(indices, global_batch), draws, everywhere=everywhere)

    def _positions(self, indices: np.ndarray, global_batch: int) -> np.ndarray:
        used = self.n // global_batch * global_batch
        return indices // used * self.n + indices % used


class Order:
    """A sequence in global batches of `global_batch`, each cut over `world` ranks and `accumulation` micro-batches."""

    def __init__(
        self,
        sequence: Sequence,
        *,
        global_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        shard: np.ndarray | None = None,
    ) -> None:
        """`shard`: each sample's shard; a global batch is then sorted by it, so that a rank touches few of them."""
        check_batch(sequence.n, global_batch, world * accumulation)
        self.sequence, self.global_batch, self.accumulation, self.rank = sequence, global_batch, accumulation, rank
        self.micro = global_batch // (world * accumulation)
        self.steps_per_epoch = sequence.n // global_batch
        self._shard = shard

    def indices(self, step: int, micro: int) -> np.ndarray:
        """Positions in the endless sequence, int64 (b,), of this rank's micro-batch number `micro` of `step`."""
        first = step * self.global_batch + (self.rank * self.accumulation + micro) * self.micro
        return np.arange(first, first + self.micro, dtype=np.int64)

    def share(self, step: int) -> np.ndarray:
        """Positions, int64 (b,), of all that this rank reads in `step`."""
        first = step * self.global_batch + self.rank * self.accumulation * self.micro
        return np.arange(first, first + self.accumulation * self.micro, dtype=np.int64)

    def samples(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the endless sequence -> samples of the set, int64 (b,)."""
        return self.sequence.samples(self._unsorted(indices), self.global_batch)

    def substitute(self, index: int, attempt: int) -> int:
        """Another sample for a position whose own is bad: a function of (seed, index, attempt) alone."""
        return self.sequence.substitute(int(self._unsorted(np.array([index]))[0]), self.global_batch, attempt)

    def beside(self, indices: np.ndarray, draws: np.ndarray, *, everywhere: bool = False) -> np.ndarray:
        """Further samples for these positions, int64 (b,), chosen by `draws` (uint64, as many); see `Sequence.beside`."""
        return self.sequence.beside(self._unsorted(indices), self.global_batch, draws, everywhere=everywhere)

    def _unsorted(self, indices: np.ndarray) -> np.ndarray:
        """Where the samples at these positions stood before their global batches were sorted by shard."""
        if self._shard is None:
            return indices
        steps = indices // self.global_batch
        out = np.empty_like(indices)
        for step in np.unique(steps):
            whole = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
            by_shard = whole[np.argsort(self._shard[self.sequence.samples(whole, self.global_batch)], kind="stable")]
            here = steps == step
            out[here] = by_shard[indices[here] - step * self.global_batch]
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
