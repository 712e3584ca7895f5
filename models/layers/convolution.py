"""Convolutions that give right gradients everywhere, and the memory layout that they are quick with."""

import torch
from torch import Tensor, nn


def layout(x: Tensor) -> torch.memory_format:
    """What convolutions of (B, C, *S) are quick with: channels last, but for half precision on a CPU.

    There eager torch would turn the weights round for it and their gradients back in every step: a third of one, where layers are wide
    and pictures small.
    """
    if x.device.type == "cpu" and (x.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")):
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)


def laid_out(x: Tensor) -> Tensor:
    """The same numbers in that layout."""
    return x.contiguous(memory_format=layout(x))


class Conv3d(nn.Conv3d):
    """nn.Conv3d, in float32 on a CPU: there the gradient of its input in bfloat16 is garbage for some widths (oneDNN in torch 2.11 to 2.15:
    4 to 32 channels and 512 to 1 are two of them), infinite or merely wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(torch.promote_types(self.weight.dtype, torch.float32)))
