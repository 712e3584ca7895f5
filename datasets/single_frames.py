"""Single frames as samples: which frames of the stored clips an image model is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils.rng import hash_indices

STREAM = "data/frames"
_FRAME_BITS = 24
"""A clip has at most 2**24 frames (`datasets.tables.MAX_FRAMES`)."""
_CHUNK = 1 << 20
"""Frames that are drawn at a time."""


@dataclass(frozen=True)
class SingleFrames:
    """The kept frames of all samples, in the order of the samples: 8 bytes each."""

    sample: np.ndarray
    """int32 (n,)."""
    frame: np.ndarray
    """int32 (n,), number of the frame in its clip."""

    @classmethod
    def draw(cls, frames: np.ndarray, share: float, seed: int) -> "SingleFrames":
        """Each frame of clips of so many `frames` (n,) is kept with probability `share`, by a draw of (seed, sample, frame) alone."""
        samples, numbers = [], []
        for sample, frame in _all_frames(frames):
            draws = hash_indices(seed, STREAM, sample << _FRAME_BITS | frame)
            kept = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share
            samples.append(sample[kept].astype(np.int32))
            numbers.append(frame[kept].astype(np.int32))
        return cls(np.concatenate(samples), np.concatenate(numbers))

    def __len__(self) -> int:
        return len(self.sample)

    def bounds(self, firsts: np.ndarray) -> np.ndarray:
        """Where the frames of each of some runs of samples begin, given the runs' first samples."""
        return np.searchsorted(self.sample, firsts)


def _all_frames(frames: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sample, frame), int64, of every frame, some samples at a time."""
    ends = np.cumsum(frames, dtype=np.int64)
    low = 0
    while low < len(frames):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
        counts = frames[low:high]
        first = np.cumsum(counts) - counts
        yield np.repeat(np.arange(low, high), counts), np.arange(int(counts.sum())) - np.repeat(first, counts)
        low = high
