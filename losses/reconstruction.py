"""Reconstruction losses of the autoencoders (spec, cmd.md section 4, latte.md 4.3, hvdm.md 5). All give one value per sample, (B,)."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.layers.wavelet import haar3d


def l1(target: Tensor, recon: Tensor) -> Tensor:
    """Mean absolute error of clips (B, ...)."""
    return (target - recon).abs().flatten(1).mean(1)


def mse(target: Tensor, recon: Tensor) -> Tensor:
    """Mean squared error of clips or frames (B, ...)."""
    return (target - recon).square().flatten(1).mean(1)


def subbands(target: Tensor, recon: Tensor) -> Tensor:
    """Mean absolute difference of the 3-D Haar coefficients of clips (B, C, T, h, w): the mean over the eight subbands.

    The release's term, (4/8) times the sum over the subbands, is 4 times this. Raises ValueError for odd sizes.
    """
    return haar3d(target - recon).abs().flatten(1).mean(1)  # of the difference: the transform is linear


def kl_to_standard(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of diagonal Gaussians (B, ...) from the standard normal, summed over all elements of a sample, in nats."""
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).flatten(1).sum(1)


def pick_frame(video: Tensor, index: Tensor) -> Tensor:
    """Frame index[b] of each clip: (B, C, T, h, w), (B,) -> (B, C, h, w)."""
    return video[torch.arange(len(video), device=video.device), :, index]


def perceptual(distance: Callable[[Tensor, Tensor], Tensor], target: Tensor, recon: Tensor, index: Tensor) -> Tensor:
    """`distance` of images -> (B,), applied to frame index[b] of each clip (B, C, T, h, w), the same in both."""
    return distance(pick_frame(target, index), pick_frame(recon, index))
