"""Convolutions on the wavelet subbands of a clip: from a subband's resolution to a cell a patch, frame by frame (spec, hvdm.md section 4).

The release calls its kernels 1 x 3 x 3; they never look along time, so they are 2-D convolutions over all frames of all clips at once.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.layers.convolution import laid_out


class VolumeNorm(nn.Module):
    """Instance norm over time, height and width, with a scale and an offset a channel, then tanh."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, clips: int) -> Tensor:
        """(b t, C, h, w) -> the same; statistics in float32."""
        clip = x.unflatten(0, (clips, -1)).to(torch.promote_types(x.dtype, torch.float32))  # (b, t, C, h, w)
        variance, mean = torch.var_mean(clip, dim=(1, 3, 4), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (clip * scale + (self.bias[:, None, None] - mean * scale)).tanh().to(x.dtype).flatten(0, 1)


class FrequencyStem(nn.Module):
    """Convolutions of 3 x 3, each with a `VolumeNorm` behind it: those of `widths` with `strides`, then two more at stride 1 to `dim`."""

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[int], dim: int) -> None:
        super().__init__()
        sizes = [channels, *widths, dim, dim]
        steps = zip(pairwise(sizes), [*strides, 1, 1], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, stride, 1) for (before, after), stride in steps)
        self.norms = nn.ModuleList(VolumeNorm(width) for width in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, t, h, w) -> tokens (t, b, h' w', d)."""
        clips, frames = x.shape[0], x.shape[2]
        x = laid_out(x.transpose(1, 2).flatten(0, 1).to(self.dtype))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), clips)
        rows = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (clips, frames)).transpose(0, 1)
        return rows.clone(memory_format=torch.contiguous_format)  # a copy: sharding warns of units that return views

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in."""
        return next(self.parameters()).dtype


def stem_strides(patch: int, count: int) -> tuple[int, ...]:
    """Strides of `count` convolutions that bring a subband, half the size of the clip, to one cell a patch.

    2, 1, 2, 1 for the release's patch of 8: stride 2 at the even places first, then at the odd ones. Raises ValueError for a patch that
    is no power of two, or needs more convolutions than there are.
    """
    halvings = patch.bit_length() - 2
    if patch < 2 or patch & (patch - 1):
        raise ValueError(f"patch_size {patch}: the convolutions on the subbands need a power of two, at least 2")
    if halvings > count:
        raise ValueError(f"patch_size {patch} halves the subbands {halvings} times, and freq_widths has {count} convolutions")
    halved = [*range(0, count, 2), *range(1, count, 2)][:halvings]
    return tuple(2 if place in halved else 1 for place in range(count))
