"""Convolutions that give right gradients everywhere."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d, in float32 on a CPU: there the gradient of its input in bfloat16 is garbage for some widths (oneDNN in torch 2.11 to 2.15:
    4 to 32 channels and 512 to 1 are two of them), infinite or merely wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(torch.promote_types(self.weight.dtype, torch.float32)))
