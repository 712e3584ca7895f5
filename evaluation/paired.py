"""Frechet distances of clips from what an autoencoder gives back of them (rFVD, rFID), summed up while they are reconstructed."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.extractors import Extractor, open_extractor
from evaluation.protocols import PROTOCOLS, Protocol
from evaluation.report import too_few
from launch.env import Env
from metrics.frame_features import open_inception
from metrics.frechet import Moments, frechet_distance
from utils.media import to_uint8


class PairedDistance:
    """One distance, through one network. Every rank adds its clips; then all of them come to the same figure."""

    def __init__(self, name: str, unit: str, rules: Protocol, extractor: Extractor) -> None:
        """`name`: of the figure. `unit`: what has one vector of features."""
        self.name, self.unit, self.rules, self.extractor = name, unit, rules, extractor
        self._sides: tuple[Moments, Moments] | None = None

    def update(self, clips: Tensor, recon: Tensor) -> None:
        """Adds clips and reconstructions, b 3 t h w in [-1, 1], as they look in 8 bits."""
        rows = [self.extractor(to_uint8(videos)) for videos in (clips, recon)]
        self._sides = self._sides or _empty(rows[0].shape[1])
        for side, found in zip(self._sides, rows, strict=True):
            side.update(found)

    def finish(self, env: Env) -> tuple[float, list[str]]:
        """The distance of all ranks' clips, and what to know of it. To be called by all ranks, also by one that has none."""
        dims: list[int] = [0] * env.world_size
        if env.world_size > 1:
            dist.all_gather_object(dims, self._sides[0].dim if self._sides else 0)
        real, fake = self._sides = self._sides or _empty(max(dims))
        real.reduce()
        fake.reduce()
        notes = [f"{self.name}: {note}" for note in too_few(real.n, real.dim, self.unit)]
        return frechet_distance(real, fake, unbiased=self.rules.unbiased), notes

    def describe(self, clips: int, frames: int) -> dict[str, Any]:
        """How it was measured."""
        name = f"{self.name}{clips}_{frames}f" + ("" if self.unit == "frames" else f"_{self.rules.name}")
        return {"id": name, "covariance": self.rules.covariance, "detector": self.extractor.identity()}


def _empty(dim: int) -> tuple[Moments, Moments]:
    return Moments(dim), Moments(dim)


def open_distances(i3d: str, inception: str, device: torch.device) -> list[PairedDistance]:
    """Those whose network is named: rFVD as PVDM, HVDM and CMD measure it, rFID of single frames. Raises UserError."""
    found = []
    if i3d:
        rules = PROTOCOLS["pvdm"]
        found.append(PairedDistance("rfvd", "clips", rules, open_extractor(rules.network, i3d, "--i3d", rules, device)))
    if inception:
        found.append(PairedDistance("rfid", "frames", Protocol("frames", unbiased=True), open_inception(inception, device)))
    return found
