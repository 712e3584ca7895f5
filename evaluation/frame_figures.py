"""Figures of single frames of clips and their reconstructions: PSNR, SSIM, mean absolute difference, a perceptual distance."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.env import Env
from losses import perceptual
from metrics.frames import SSIM_WINDOW, lpips, psnr, quantise, ssim
from metrics.resampling import interval, resampled_counts
from utils.files import sha256_file

PER_CLIP = "8 bit, mean squared error per clip, mean over clips, dB"
"""PSNR of whole clips, in words: another figure than that of single frames."""


class FrameFigures:
    """Clips and reconstructions, b 3 t h w in [-1, 1] -> figures by name, each (b,)."""

    def __init__(self, network: perceptual.Kind, weights: str, env: Env, *, psnr_per_clip: bool) -> None:
        """`network`: of the perceptual distance. It is left out, which a line says, where its weights have no path and are not there."""
        self.psnr_per_clip, self.identity = psnr_per_clip, {"perceptual": "none"}
        file = perceptual.FILES.get(network)
        if file is not None and not weights and not file.default_path().is_file():
            if env.is_main:
                print(f"{network} is left out, {file.name} ({file.size}) is not there: {file.sources()}", file=sys.stderr, flush=True)
            self._distance, self.identity = None, {"perceptual": "none: weights missing"}
            return
        distance = perceptual.build(network, weights)
        self._distance = None if distance is None else distance.to(env.device)
        if file is not None:
            self.identity = {"perceptual": network, "perceptual_sha256": sha256_file(Path(weights) if weights else file.default_path())}

    @torch.no_grad()
    def __call__(self, clips: Tensor, made: Tensor) -> dict[str, Tensor]:
        """SSIM is left out of frames that are smaller than its window."""
        values = {"psnr": psnr(clips, made, per_clip=self.psnr_per_clip), "l1": (quantise(clips) - quantise(made)).abs().flatten(1).mean(1)}
        if min(clips.shape[-2:]) >= SSIM_WINDOW:
            values["ssim"] = ssim(clips, made)
        if self._distance is not None:
            values[self.identity["perceptual"].replace("-", "_")] = lpips(self._distance, clips, made)
        return values

    def describe(self) -> dict[str, Any]:
        """How they are measured, in words."""
        return {
            "psnr": PER_CLIP if self.psnr_per_clip else "8 bit, mean squared error per frame, mean over clips, dB",
            "ssim": "8 bit, Gaussian 11x11 sigma 1.5, per frame, mean over clips",
            "l1": "8 bit, mean absolute difference on [0, 1]",
            **self.identity,
        }


def means(name: str, values: Tensor, bootstrap: int, seed: int) -> dict[str, float]:
    """The mean of a figure over clips, and its interval where there are to be resampled sets of them; one clip has none."""
    each = values.double().numpy()
    found = {name: float(each.mean())}
    if bootstrap and len(each) > 1:
        resampled = resampled_counts(bootstrap, len(each), seed, "clips") @ each / len(each)
        found[f"{name}_low"], found[f"{name}_high"] = interval(found[name], resampled.tolist())
    return found
