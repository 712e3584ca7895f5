"""SPyNet: optical flow from a pyramid of small convolutional networks (spec, vidm.md section 3.6).

Letters: b batch, h and w sides.
"""

import itertools
import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.precision import without_autocast
from models.layers.warp import warp
from utils.errors import UserError
from utils.weights import load_tensors

InputRange = Literal["zero_one", "minus_one_one"]

LEVELS = 6
FILE = "spynet_20210409-c6c1bd09.pth"
"""mmediting's trained weights."""
WIDTHS = (8, 32, 64, 32, 16, 2)
"""Channels between the convolutions of a level: two pictures and a flow at first, a flow at last."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's pictures in [0, 1]."""


class ExactConv2d(nn.Conv2d):
    """A convolution in the type of its input, whatever its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        return self._conv_forward(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class FlowLevel(nn.Module):
    """What a level adds to the flow of the coarser one."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ExactConv2d(before, after, 7, padding=3) for before, after in itertools.pairwise(WIDTHS))

    def forward(self, x: Tensor) -> Tensor:
        """(b, 8, h, w) -> (b, 2, h, w)."""
        *others, last = self.convs
        for conv in others:
            x = F.relu(conv(x))
        return last(x)


class SpyNet(nn.Module):
    """Flow between two pictures in [-1, 1], in float32 whatever the autocast: positions in pixels need it.

    `input_range`: what the network is given: pictures in [0, 1], for which it was made, or as they are, which VIDM's release does.
    """

    float32 = True
    """Where weights are sharded they come as they are kept."""

    def __init__(self, levels: int = LEVELS, input_range: InputRange = "zero_one") -> None:
        super().__init__()
        self.input_range: InputRange = input_range
        self.levels = nn.ModuleList(FlowLevel() for _ in range(levels))

    def forward(self, ref: Tensor, supp: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] of any size -> (b, 2, h, w) in pixels, x then y: where in `supp` what `ref` shows is."""
        with without_autocast(ref):
            exact = torch.promote_types(ref.dtype, torch.float32)
            return self._flow(ref.to(exact), supp.to(exact))

    def _flow(self, ref: Tensor, supp: Tensor) -> Tensor:
        h, w = ref.shape[2:]
        times = 2 ** (len(self.levels) - 1)
        sides = (-(-h // times) * times, -(-w // times) * times)
        refs, supps = self._pyramid(ref, sides), self._pyramid(supp, sides)
        flow = ref.new_zeros(len(ref), 2, sides[0] // times, sides[1] // times)
        for k, level in enumerate(self.levels):
            if k:
                flow = 2 * F.interpolate(flow, scale_factor=2.0, mode="bilinear", align_corners=True)
            flow = flow + level(torch.cat([refs[k], warp(supps[k], flow), flow], dim=1))
        flow = _resized(flow, (h, w))
        return torch.stack([flow[:, 0] * (w / sides[1]), flow[:, 1] * (h / sides[0])], dim=1)

    def _pyramid(self, picture: Tensor, sides: tuple[int, int]) -> list[Tensor]:
        """The picture, normalised, from the coarsest level to the finest."""
        x = _resized(picture / 2 + 0.5 if self.input_range == "zero_one" else picture, sides)
        channels = zip(x.unbind(1), MEAN, STD, strict=True)
        pictures = [torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)]
        for _ in self.levels[1:]:
            pictures.append(F.avg_pool2d(pictures[-1], 2))
        return pictures[::-1]


def _resized(x: Tensor, sides: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == sides else F.interpolate(x, sides, mode="bilinear", align_corners=False)


def load_spynet(path: str | Path, levels: int = LEVELS) -> dict[str, Tensor]:
    """State dict of SpyNet from mmediting's file of trained weights. Raises UserError for a file that is missing or another's."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give mmediting's {FILE}, or no file to train the flow network from scratch")
    tensors = load_tensors(path)
    found = tensors.get("state_dict", tensors)
    pattern = re.compile(r"basic_module\.(\d+)\.basic_module\.(\d+)\.conv\.")
    state = {pattern.sub(r"levels.\1.convs.\2.", name): value.float() for name, value in found.items() if name not in ("mean", "std")}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in SpyNet(levels).state_dict().items()}
    if {name: value.shape for name, value in state.items()} != shapes:
        raise UserError(f"{path} has not the tensors of a SPyNet of {levels} levels: give mmediting's {FILE}")
    return state
