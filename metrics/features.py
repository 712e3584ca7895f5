"""Vectors of numbered videos, kept: for figures that need all of them at once."""

import torch
import torch.distributed as dist
from torch import Tensor


class FeatureRows:
    """One row for each video of a set, in whichever order and on whichever rank it was made."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._rows: list[Tensor] = []

    def update(self, numbers: list[int], rows: Tensor) -> None:
        """Adds rows (k, dim), those of the videos `numbers`. ValueError for another count, or for numbers that are not finite."""
        if rows.ndim != 2 or len(rows) != len(numbers):
            raise ValueError(f"features {list(rows.shape)} of {len(numbers)} videos: one row for each is wanted")
        if not rows.isfinite().all():
            raise ValueError("features that are not finite: the videos or the network that they came from are broken")
        self._numbers += numbers
        self._rows += list(rows.double().cpu())

    def gather(self) -> Tensor:
        """All rows of all ranks, (n, dim) float64, in the order of their numbers. To be called by all, also by one that has none."""
        pairs = list(zip(self._numbers, self._rows, strict=True))
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[tuple[int, Tensor]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, pairs)
            pairs = [pair for part in gathered for pair in part]
        pairs.sort(key=lambda pair: pair[0])
        numbers = [number for number, _ in pairs]
        assert len(set(numbers)) == len(numbers), "a video was counted twice"
        if not pairs:
            raise ValueError("no videos to take features of")
        return torch.stack([row for _, row in pairs])
