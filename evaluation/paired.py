"""What is measured of clips and of their reconstructions: a row of numbers for each pair, and distances of the whole sets (rFVD, rFID)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evaluation.extractors import Extractor, open_extractor
from evaluation.protocols import PROTOCOLS, Protocol, figure_name
from evaluation.quality import meet
from evaluation.report import too_few
from launch.env import Env
from metrics.frame_features import open_inception
from metrics.frechet import Moments, frechet_distance
from metrics.resampling import bootstrap_frechet, interval
from utils.media import to_float, to_uint8

Reconstruct = Callable[[Tensor, range], Tensor]
"""(clips b 3 t h w in [-1, 1], their places) -> what is made of them, of the same shape."""
FrameFigures = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(clips, reconstructions), b 3 t h w in [-1, 1] -> figures by name, each (b,)."""


class PairedDistance:
    """One distance of the originals from the reconstructions, through one network, summed up in the order of the pairs."""

    def __init__(self, name: str, unit: str, rules: Protocol, extractor: Extractor) -> None:
        """`name`: of the figure. `unit`: what has one vector of features."""
        self.name, self.unit, self.rules, self.extractor = name, unit, rules, extractor
        self._sums: list[Moments] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def features(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """uint8 b 3 t h w, twice -> (b, 2, k, dim): k vectors of each clip, those of its reconstruction behind them."""
        both = [self.extractor(videos).unflatten(0, (len(videos), -1)) for videos in (originals, reconstructions)]
        return torch.stack(both, dim=1)

    def update(self, features: Tensor, *, keep: bool) -> None:
        """Adds pairs. `keep`: for intervals, which need the features themselves."""
        sides = features.unbind(dim=1)
        self._sums = self._sums or [Moments(side.shape[-1]) for side in sides]
        for moments, side in zip(self._sums, sides, strict=True):
            moments.update(side.flatten(0, 1))
        if keep:
            self._rows.append((sides[0], sides[1]))

    def finish(self, bootstrap: int, seed: int, env: Env) -> tuple[dict[str, float], list[str]]:
        """The distance, its interval where there are to be resampled sets, and what to know of it; on rank 0, see `meet`."""
        real, fake = self._sums
        value = frechet_distance(real, fake, unbiased=self.rules.unbiased)
        figures = {self.name: value}
        if bootstrap:
            rows = [torch.cat(side) for side in zip(*self._rows, strict=True)]
            how = {"unbiased": self.rules.unbiased, "paired": True}
            resampled = bootstrap_frechet(rows[0], rows[1], bootstrap, seed, **how, after_each=partial(meet, env))
            low, high = interval(value, resampled)
            figures |= {f"{self.name}_low": max(low, 0.0), f"{self.name}_high": high}
        return figures, [f"{self.name}: {note}" for note in too_few(real.n, real.dim, self.unit)]

    def describe(self, clips: int, frames: int, stride: int) -> dict[str, Any]:
        """How it was measured; after `update`."""
        name = figure_name(self.name, clips, frames, stride) + ("" if self.unit == "frames" else f"_{self.rules.name}")
        dim = self._sums[0].dim
        return {"id": name, "covariance": self.rules.covariance, "dim": dim, "detector": self.extractor.identity()}


def open_distances(i3d: str, inception: str, device: torch.device) -> list[PairedDistance]:
    """Those whose network is named: rFVD as PVDM, HVDM and CMD measure it, rFID of single frames. Raises UserError."""
    found = []
    if i3d:
        rules = PROTOCOLS["pvdm"]
        found.append(PairedDistance("rfvd", "clips", rules, open_extractor(rules.network, i3d, "--i3d", rules, device)))
    if inception:
        found.append(PairedDistance("rfid", "frames", Protocol("frames", unbiased=True), open_inception(inception, device)))
    return found


class Comparison:
    """Clips -> one row of numbers for each and its reconstruction: figures of frames, then the features of both for each distance."""

    def __init__(
        self,
        reconstruct: Reconstruct | None,
        figures: FrameFigures,
        distances: list[PairedDistance],
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        """`reconstruct` None: the frames of a reconstruction come behind those of its original. `shape`: of a clip, t h w.

        A black pair is measured at once: it says how many numbers there are, and what a network cannot take is found before the rest.
        """
        self._reconstruct, self._figures, self._distances, self._device = reconstruct, figures, distances, device
        black = torch.zeros(1, 3, *shape, dtype=torch.uint8, device=device)
        self._shapes = {name: part.shape[1:] for name, part in self._parts(black, to_float(black)).items()}

    def __call__(self, videos: Tensor, places: range) -> Tensor:
        """uint8 b 3 t h w (2 t with reconstructions) -> rows (b, numbers)."""
        clips = videos.to(self._device)
        # What is kept must not depend on a choice of algorithm, nor have the three digits of TF32: of the autoencoder neither.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            if self._reconstruct is None:
                clips, others = clips.chunk(2, dim=2)
                made = to_float(others)
            else:
                made = self._reconstruct(to_float(clips), places)
            return torch.cat([part.reshape(len(clips), -1).float() for part in self._parts(clips, made).values()], dim=1)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows as they were before they were joined: figures (b,), features of a distance (b, 2, k, dim)."""
        parts = rows.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _parts(self, clips: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Of clips uint8, and what was made of them in [-1, 1]; networks see both in 8 bits."""
        parts = self._figures(to_float(clips), made)
        return parts | {one.name: one.features(clips, to_uint8(made)) for one in self._distances}
