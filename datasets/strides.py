"""Clips of frames at one of several distances, drawn sample by sample: the number drawn for the first frame says the distance too."""

from collections.abc import Sequence

import numpy as np
import torch

from datasets.config import DataConfig
from datasets.faults import Fault
from datasets.handles import Handles
from datasets.mixture import Collection
from datasets.pairs import PairReader
from datasets.reader import ClipReader
from utils.errors import ConfigError


class StrideReader:
    """Reads through one of several readers, which differ in the distance of frames alone.

    Of a sample those count whose windows the stored clip is long enough for (with frames before the clip, if it is for any of them), each
    as often as the others. Otherwise as they.
    """

    def __init__(self, readers: Sequence[ClipReader | PairReader]) -> None:
        self.readers = readers
        first = readers[0]
        self.shards, self.handles, self.n_frames = first.shards, first.handles, first.n_frames
        self.empty, self.split, self.fill_vectors = first.empty, first.split, first.fill_vectors

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """How many numbers there are to draw from for each sample, int64 (b,): as many for each distance."""
        counts = self._counts(samples)
        usable: np.ndarray = (counts > 0).sum(axis=0) * counts.max(axis=0)
        return usable

    def beside(self, samples: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """As of the readers, and `stride`: which of them, int64 (b,)."""
        which, first = self._drawn(samples, starts)
        parts = [reader.beside(samples, first) for reader in self.readers]
        rows = torch.arange(len(samples))
        chosen = torch.from_numpy(which)
        return {name: torch.stack([part[name] for part in parts])[chosen, rows] for name in parts[0]} | {"stride": chosen}

    def fill(self, out: np.ndarray, rows: np.ndarray, samples: np.ndarray, starts: np.ndarray) -> list[tuple[int, Fault]]:
        """As ClipReader.fill."""
        which, first = self._drawn(samples, starts)
        faults = []
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            part = self.readers[number].empty(len(here))
            found = self.readers[number].fill(part, np.arange(len(here)), samples[here], first[here])
            out[rows[here]] = part
            faults += [(int(here[k]), fault) for k, fault in found]
        return faults

    def _counts(self, samples: np.ndarray) -> np.ndarray:
        """Windows (readers, b) of each sample; 0 where it is too short, or where others have frames before the clip and this has none."""
        counts = np.stack([np.maximum(reader.windows(samples), 0) for reader in self.readers])
        before = [reader.has_previous(samples) for reader in self.readers if isinstance(reader, PairReader)]
        if before:
            counts *= np.stack(before) | ~np.any(before, axis=0)
        return counts

    def _drawn(self, samples: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(reader, first frame), int64 (b,) each, that the numbers mean."""
        counts = self._counts(samples)
        usable = counts > 0
        turn, place = starts % usable.sum(axis=0), starts // usable.sum(axis=0)
        which = (np.cumsum(usable, axis=0) <= turn).sum(axis=0)
        # As evenly as whole numbers allow: the longest distances have the fewest windows.
        first: np.ndarray = place * counts[which, np.arange(len(samples))] // counts.max(axis=0)
        return which, first


def open_strides(shards: Collection, data: DataConfig, strides: Sequence[int]) -> StrideReader:
    """A reader of clips of frames so far apart. Raises ConfigError where they are none of stored clips."""
    told = f"--frame-strides {' '.join(map(str, strides))}"
    if shards.is_latent:
        raise ConfigError(f"{told}: {shards.location} holds latents of chosen frames; drop the flag")
    if data.frame_interval != 1 or data.clip_rule != "consecutive":
        raise ConfigError(f"{told}: goes with neither --frame-interval nor --clip-rule linspace; drop one of the flags")
    for stride, at_hand, whose in ((max(strides), int(shards.frames.max()), "longest"), (min(strides), shards.clip_length, "shortest")):
        needed = (data.n_frames - 1) * stride + 1
        if needed > at_hand:
            raise ConfigError(
                f"{told}: {data.n_frames} frames {stride} apart take {needed}, the {whose} clip of {shards.location} has {at_hand}"
            )
    handles = Handles(shards)
    if data.previous:
        return StrideReader([PairReader(shards, data.n_frames, interval=stride, handles=handles) for stride in strides])
    return StrideReader([ClipReader(shards, data.n_frames, interval=stride, handles=handles) for stride in strides])
