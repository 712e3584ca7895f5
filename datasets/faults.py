"""Samples that cannot be read: what is known of one, and the log that reports each once, counts them and ends a run of too many."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datasets.mixture import Collection
from utils.errors import UserError

_log = logging.getLogger(__name__)

FEW = 10
"""Bad samples that never end a run, however small the set: they say nothing about its share yet."""
_LINES = 100
"""Bad samples that get a line of their own, per process; the rest is counted only."""
_EXAMPLES = 3


@dataclass(frozen=True)
class Fault:
    """One sample that could not be read."""

    sample: int
    shard: int
    reason: str
    """Short class of trouble, to count by."""
    text: str
    """The line for the user: shard, key, trouble, cure."""
    whole_shard: bool = False
    """Whether no sample of the shard can be read."""


class FaultLog:
    """The bad samples that one rank has met under `--on-bad-sample skip`."""

    def __init__(self, shards: Collection, max_share: float, *, rank: int = 0) -> None:
        """Raises UserError when the shards that are known to be bad hold too many samples."""
        self._shards, self._max_share = shards, max_share
        self._seen = 0
        self._replaced = 0
        self._samples: set[int] = set()
        self._bad_shards = set(shards.bad)
        self._reasons: Counter[str] = Counter()
        self._examples: list[str] = []
        in_shards = int(np.isin(shards.shard, list(shards.bad)).sum())
        for why in list(shards.bad.values())[: _LINES if rank == 0 else 0]:
            _log.warning("bad shard, others take the place of its samples: %s", why)
        if in_shards + len(shards.bad_samples) > self._allowed(shards.num_samples):
            self._reasons.update(shards.bad_samples.values())
            self._reasons["unreadable shard"] = in_shards
            self._examples = [shards.describe_shard(shard) for shard in list(shards.bad)[:_EXAMPLES]]
            raise UserError(self._summary(in_shards + len(shards.bad_samples), shards.num_samples, "samples cannot be used"))

    def _allowed(self, seen: int) -> float:
        """Bad samples that may be among the first `seen`."""
        return max(self._max_share * min(seen, self._shards.num_samples), FEW if self._max_share > 0 else 0)

    def record(self, seen: int, faults: Sequence[Fault]) -> None:
        """Count a micro-batch of `seen` samples and report what is new. UserError with a summary when too many are bad."""
        self._seen += seen + len(faults)  # for each bad one another was read
        self._replaced += len(faults)
        for fault in faults:
            if fault.sample not in self._samples:
                self._report(fault)
        if faults and len(self._samples) > self._allowed(self._seen):
            total = min(self._seen, self._shards.num_samples)
            raise UserError(self._summary(len(self._samples), total, "samples read are bad"))

    def _report(self, fault: Fault) -> None:
        self._samples.add(fault.sample)
        self._reasons[fault.reason] += 1
        if len(self._examples) < _EXAMPLES:
            self._examples.append(self._shards.describe(fault.sample))
        if fault.whole_shard and fault.shard in self._bad_shards:
            return  # the shard has been reported
        if fault.whole_shard:
            self._bad_shards.add(fault.shard)
        if len(self._samples) <= _LINES:
            _log.warning("bad %s, another takes its place: %s", "shard" if fault.whole_shard else "sample", fault.text)
        if len(self._samples) == _LINES:
            _log.warning("further bad samples are counted only")

    def _summary(self, bad: int, seen: int, what: str) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common(_EXAMPLES + 2))
        examples = f"; first {', '.join(self._examples)}" if self._examples else ""
        return (
            f"{bad} of {seen} {what}, more than --max-bad-share {self._max_share:g} ({counts}{examples}): "
            "repair the set (preprocess.py verify SHARDS lists all), or allow more"
        )

    def counters(self) -> dict[str, int | frozenset[str]]:
        """Samples replaced since this process began, and the bad shards met so far."""
        return {
            "data/bad_samples": self._replaced,
            "data/bad_shards": frozenset(map(self._shards.describe_shard, self._bad_shards)),
        }
