"""Clips together with what came before them: windows of twice the length, where the stored clip has so many frames."""

import numpy as np
import torch

from datasets.faults import Fault
from datasets.handles import Handles
from datasets.mixture import Collection
from datasets.reader import ClipReader


class PairReader:
    """Reads `n_frames` and the `n_frames` before them, one window of consecutive frames (`interval` apart).

    A stored clip that is too short for both gives a window of `n_frames` behind as many black ones, which are no frames of anything:
    `has_previous` says for which samples they are. Otherwise as a ClipReader.
    """

    def __init__(self, shards: Collection, n_frames: int, *, interval: int = 1, handles: Handles | None = None) -> None:
        """`handles`: those of another reader of the same shards, whose open files are shared."""
        self._both = ClipReader(shards, 2 * n_frames, interval=interval, handles=handles)
        self._alone = ClipReader(shards, n_frames, interval=interval, handles=self._both.handles)
        self.shards, self.handles, self.n_frames = shards, self._both.handles, n_frames

    def has_previous(self, samples: np.ndarray) -> np.ndarray:
        """Whether there are frames before the clip, bool (b,)."""
        return self._both.windows(samples) > 0

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """How many windows each sample has, int64 (b,)."""
        both = self._both.windows(samples)
        return np.where(both > 0, both, self._alone.windows(samples))

    def beside(self, samples: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """`has_previous`, bool (b,)."""
        return {"has_previous": torch.from_numpy(self.has_previous(samples))}

    def empty(self, count: int) -> np.ndarray:
        """Room for `count` samples, uint8 (count, 2 n_frames, bytes)."""
        return self._both.empty(count)

    def fill(self, out: np.ndarray, rows: np.ndarray, samples: np.ndarray, starts: np.ndarray) -> list[tuple[int, Fault]]:
        """As ClipReader.fill."""
        whole = self.has_previous(samples)
        if whole.all():
            return self._both.fill(out, rows, samples, starts)
        faults = []
        for reader, here in ((self._both, np.flatnonzero(whole)), (self._alone, np.flatnonzero(~whole))):
            part = reader.empty(len(here))
            found = reader.fill(part, np.arange(len(here)), samples[here], starts[here]) if len(here) else []
            out[rows[here], -reader.n_frames :] = part
            faults += [(int(here[k]), fault) for k, fault in found]
        out[rows[~whole], : self.n_frames] = 0
        return faults

    def fill_vectors(self, out: np.ndarray, rows: np.ndarray, samples: np.ndarray) -> list[tuple[int, Fault]]:
        """As ClipReader.fill_vectors."""
        return self._both.fill_vectors(out, rows, samples)

    def split(self, stored: np.ndarray) -> dict[str, torch.Tensor]:
        """As ClipReader.split."""
        return self._both.split(stored)
