"""Frame metrics of a reconstruction against its original. Videos are b c t h w in [-1, 1]; each function gives one number per clip."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PSNR_CAP = 100.0
"""Decibels given to a frame that equals its original: the true value, infinity, would swallow every mean."""
SSIM_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def quantise(video: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1] as it looks after being stored: clamped and rounded to 8 bits."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round() / 255


def psnr(original: Tensor, reconstruction: Tensor, *, per_clip: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB, (b,): from the squared error on [0, 1] of each frame, mean over frames.

    `per_clip` takes the squared error over the whole clip first (the PVDM convention; a lower number).
    """
    error = (quantise(original) - quantise(reconstruction)).square()
    mse = error.mean(dim=(1, 2, 3, 4))[:, None] if per_clip else error.mean(dim=(1, 3, 4))
    return (-10 * mse.clamp_min(10 ** (-PSNR_CAP / 10)).log10()).mean(dim=1)


def ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (b,): 11x11 Gaussian of sigma 1.5, whole windows only, data range 1; mean over frames.

    Raises ValueError when a frame is smaller than the window.
    """
    if min(original.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {tuple(original.shape[-2:])}")
    x, y = (rearrange(quantise(v), "b c t h w -> (b t) c h w") for v in (original, reconstruction))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return rearrange((luminance * structure).mean(dim=(1, 2, 3)), "(b t) -> b t", b=len(original)).mean(dim=1)


def lpips(network: Callable[[Tensor, Tensor], Tensor], original: Tensor, reconstruction: Tensor, *, chunk: int = 32) -> Tensor:
    """Perceptual distance by `network` (frames n c h w in [-1, 1], twice -> n values), (b,): mean over frames, `chunk` frames at a time.

    The network belongs in the name under which the number is printed: lpips-alex and lpips-vgg differ several times over.
    """
    x, y = (rearrange(v.float().clamp(-1, 1), "b c t h w -> (b t) c h w") for v in (original, reconstruction))
    values = [network(a, b).flatten() for a, b in zip(x.split(chunk), y.split(chunk), strict=True)]
    return rearrange(torch.cat(values), "(b t) -> b t", b=len(original)).mean(dim=1)


def _blur(image: Tensor) -> Tensor:
    """n c h w -> n c h-10 w-10: each channel under the Gaussian window, one axis after the other."""
    offset = torch.arange(SSIM_WINDOW, device=image.device, dtype=image.dtype) - SSIM_WINDOW // 2
    kernel = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)
    rows = F.conv2d(image, kernel, groups=image.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=image.shape[1])
