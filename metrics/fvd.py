"""Frechet video distance as PVDM, HVDM and CMD compute it: I3D's 400 logits of whole clips, Frechet distance with unbiased covariance.

Other published numbers stretch the frames instead of cropping them; for square videos the two are the same.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from metrics.frechet import Moments, frechet_distance
from metrics.i3d import SIZE

Fit = Literal["crop", "stretch"]


def preprocess(video: Tensor, size: int = SIZE, fit: Fit = "crop") -> Tensor:
    """uint8 (b, c, t, h, w) -> float32 (b, c, t, size, size) in [-1, 1].

    crop: the shorter side becomes `size`, the longer one ceil(long size / short), of which the middle is taken; stretch: both sides
    become `size`. Bilinear without antialias, as the published numbers were made.
    """
    if video.dtype != torch.uint8:
        raise ValueError(f"videos of {video.dtype}: uint8 is wanted, as they are stored")
    height, width = video.shape[3:]
    short = min(height, width)
    frames = rearrange(video, "b c t h w -> (b t) c h w").float() / 255
    scaled = (size, size) if fit == "stretch" else (-(-height * size // short), -(-width * size // short))
    frames = F.interpolate(frames, scaled, mode="bilinear", align_corners=False)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    frames = frames[:, :, top : top + size, left : left + size]
    return rearrange((frames - 0.5) * 2, "(b t) c h w -> b c t h w", b=len(video))


@torch.no_grad()
def moments(net: nn.Module, videos: Iterable[Tensor], device: torch.device | str = "cpu", fit: Fit = "crop") -> Moments:
    """Moments of a network's features of videos, given in batches of uint8 (b, c, t, h, w). ValueError where there is none."""
    found: Moments | None = None
    for video in videos:
        features = net(preprocess(video.to(device), fit=fit))
        found = found or Moments(features.shape[1])
        found.update(features)
    if found is None:
        raise ValueError("no videos to take features of")
    return found


def fvd(net: nn.Module, real: Iterable[Tensor], fake: Iterable[Tensor], device: torch.device | str = "cpu", fit: Fit = "crop") -> float:
    """Distance of two sets of videos in batches. Published numbers are of 2,048 clips a side; smaller sets give larger values."""
    return frechet_distance(moments(net, real, device, fit), moments(net, fake, device, fit))
