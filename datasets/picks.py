"""Which sample, and which frame of it, stands at each place of a micro-batch: clips, single frames, and the images beside clips.

All of it is a function of (seed, position): `attempt` counts how often the pick of a place was found to be bad.
"""

from dataclasses import dataclass

import numpy as np
import torch

from datasets.mixture import Collection
from datasets.order import NEAR, Order
from datasets.pairs import PairReader
from datasets.reader import ClipReader
from datasets.single_frames import SingleFrames
from datasets.strides import StrideReader
from utils.rng import SampleRng, hash_indices

Picks = tuple[np.ndarray, np.ndarray]
"""Samples and their first frames, int64 (b,) each."""


@dataclass(frozen=True)
class Picker:
    """Picks by position of the endless sequence."""

    order: Order
    reader: ClipReader | PairReader | StrideReader
    """Knows how many windows a sample has."""
    seed: int
    single: SingleFrames | None = None
    """What the order goes over in place of whole samples."""

    @property
    def shards(self) -> Collection:
        return self.reader.shards

    def clips(self, indices: np.ndarray, attempt: int = 0) -> Picks:
        """(samples, first frames), int64 (b,), of the clips at these positions."""
        if attempt:
            items = np.array([self.order.substitute(index, attempt - 1) for index in indices.tolist()], dtype=np.int64)
        else:
            items = self.order.samples(indices)
        if self.single is not None:
            return self.single.sample[items].astype(np.int64), self.single.frame[items].astype(np.int64)
        return items, _integers(self.seed, "data/window", indices, self.reader.windows(items))

    def images(self, indices: np.ndarray, slots: np.ndarray, attempt: int = 0) -> Picks:
        """(samples, frames), int64 (b,), of the images in these `slots` beside the clips at these positions.

        Any sample of the clip's own shard set may be drawn; of a stream shuffled by blocks those of the clip's window of shards, so
        that no other shard must be fetched.
        """
        samples, frames = np.empty_like(indices), np.empty_like(indices)
        for slot in np.unique(slots).tolist():
            here = slots == slot
            stream = f"data/image/{slot}" + (f"/substitute/{attempt}" if attempt else "")
            draws = hash_indices(self.seed, stream, indices[here])
            samples[here] = self.order.beside(indices[here], draws, everywhere=attempt > NEAR)
            frames[here] = _integers(self.seed, f"{stream}/frame", indices[here], self.shards.frames[samples[here]])
        return samples, frames


def places(indices: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, slots), int64 (b * count,), of `count` images beside each clip."""
    return np.repeat(indices, count), np.tile(np.arange(count), len(indices))


def _integers(seed: int, stream: str, indices: np.ndarray, high: np.ndarray) -> np.ndarray:
    return SampleRng(seed, torch.from_numpy(indices)).integers(stream, torch.from_numpy(high)).numpy()
