"""The order of several sets in fixed proportions."""

from collections.abc import Sequence as Items
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np

from datasets.order import Shuffled
from utils.errors import ConfigError
from utils.rng import hash_indices

MAX_PERIOD = 1 << 16
"""Samples after which the proportions are met exactly, at most; finer weights are rounded to it."""
_BLOCK = 4096


def quotas(weights: Items[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of `weights` (as their decimal digits say): samples of each set in a period.

    A period has MAX_PERIOD samples at most: finer weights are rounded, each set keeping at least one sample. ConfigError for a
    weight that is not a positive number.
    """
    if not all(isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"--data-weights {' '.join(map(str, weights))}: each must be a positive number; leave a set out to skip it")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = lcm(*(part.denominator for part in exact))
    parts = [int(part * scale) for part in exact]
    parts = [part // gcd(*parts) for part in parts]
    total = sum(parts)
    if total <= MAX_PERIOD:
        return tuple(parts)
    shares = [Fraction(part * MAX_PERIOD, total) for part in parts]
    whole = [max(1, int(share)) for share in shares]
    # The largest remainders get what rounding down has left.
    for number in sorted(range(len(parts)), key=lambda i: int(shares[i]) - shares[i])[: max(0, MAX_PERIOD - sum(whole))]:
        whole[number] += 1
    return tuple(whole)


class Mixture:
    """Sets in fixed proportions: every period holds exactly each set's quota, in an order drawn for that period.

    Each set goes through its own permutations without end, whatever the others do.
    """

    def __init__(self, sets: Items[Shuffled], weights: Items[float], *, seed: int) -> None:
        self.sets, self.seed = list(sets), seed
        self.quotas = quotas(weights)
        self.n = sum(item.n for item in self.sets)
        self._first = np.cumsum([0, *(item.n for item in self.sets)])
        self._period = sum(self.quotas)
        self._periods = max(1, _BLOCK // self._period)
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the set, position in that set's endless sequence) for positions of the mixture."""
        blocks, slots = np.divmod(indices, self._period * self._periods)
        number, position = np.empty_like(indices), np.empty_like(indices)
        for block in np.unique(blocks):
            here = blocks == block
            sets, ranks = self._block(int(block))
            number[here], position[here] = sets[slots[here]], ranks[slots[here]]
        return number, position

    def samples(self, indices: np.ndarray, global_batch: int) -> np.ndarray:
        """As `Sequence` says; no batch is dropped, for the sets' epochs end at different times."""
        numbers, positions = self.places(indices)
        out = np.empty_like(indices)
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self._first[number] + self.sets[number].at(positions[here])
        return out

    def substitute(self, index: int, global_batch: int, attempt: int) -> int:
        """As `Sequence` says; of the same set."""
        numbers, positions = self.places(np.array([index]))
        number = int(numbers[0])
        return int(self._first[number]) + self.sets[number].near(int(positions[0]), index, attempt)

    def beside(self, indices: np.ndarray, global_batch: int, draws: np.ndarray, *, everywhere: bool = False) -> np.ndarray:
        """As `Sequence` says; so the images of all clips come from the sets in the same proportions."""
        numbers, positions = self.places(indices)
        out = np.empty_like(indices)
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self._first[number] + self.sets[number].around(positions[here], draws[here], everywhere=everywhere)
        return out

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Set and position in it for each slot of some whole periods, which are drawn at once."""
        found = self._kept.get(block)
        if found is None:
            length = self._period * self._periods
            keys = hash_indices(self.seed, "data/mixture", np.arange(block * length, (block + 1) * length))
            turns = np.argsort(keys.reshape(self._periods, self._period), axis=1, kind="stable")
            sets = np.repeat(np.arange(len(self.sets)), self.quotas)[turns].reshape(-1)
            ranks = np.empty(length, dtype=np.int64)
            for number, quota in enumerate(self.quotas):
                here = sets == number
                ranks[here] = block * self._periods * quota + np.arange(int(here.sum()))
            found = sets, ranks
            self._kept = dict(list(self._kept.items())[-1:]) | {block: found}
        return found
