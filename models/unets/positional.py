"""Blocks whose features are scaled and shifted pixel by pixel, by the step, the frame's index, the row and the column: PosGN.

Source: spec, vidm.md sections 3.1 and 3.2. Letters: b batch, C channels, h and w sides, D steps, V frame indices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.convolution import laid_out
from models.layers.precision import without_autocast
from models.unets.adm import Pointwise, Resample, conv, group_norm, resample, resampled_sides, zeroed
from models.unets.stages import Layers

Maps = tuple[Tensor, Tensor]
"""Scale and shift, (1 or b, C, h, w) each."""
Size = tuple[int, int]


class Place(NamedTuple):
    """Where in time a batch is."""

    t: Tensor
    """Steps, (1,) or (b,) int64."""
    frame: Tensor
    """Indices of the frames, (1,) or (b,) int64."""


class PosGN(nn.Module):
    """Group norm whose scale and shift are an MLP's of (step, frame, row, column), SiLU, a convolution that starts at zero.

    Nothing is stored that depends on sizes. The MLP is computed in float32 whatever the autocast: sines of coordinates need it.
    """

    def __init__(self, channels: int, steps: int, frames: int) -> None:
        super().__init__()
        self.steps, self.frames = steps, frames
        self.linear_0 = nn.Linear(4, channels)
        self.linear_1 = nn.Sequential(nn.Linear(channels, 2 * channels), nn.SiLU(), nn.Linear(2 * channels, 2 * channels))
        self.out_norm = group_norm(channels)
        self.out_rest = nn.Sequential(nn.SiLU(), zeroed(conv(2, channels, channels)))

    def coordinates(self, place: Place, size: Size) -> Tensor:
        """(b, h, w, 4) in [-1, 1]: step, frame, row, column."""
        times = [_line(count, index.device)[index] for count, index in zip((self.steps, self.frames), place, strict=True)]
        step, frame = torch.broadcast_tensors(*times)
        rows, columns = (_line(side, step.device) for side in size)
        shape = (len(step), *size)
        axes = (step[:, None, None], frame[:, None, None], rows[:, None], columns)
        return torch.stack([axis.expand(shape) for axis in axes], dim=-1)

    def maps(self, place: Place, size: Size) -> Maps:
        """Scale and shift of features of that size: (1, C, h, w) each for one step and one frame, which serve any batch, else (b, ...)."""
        first, last = self.linear_1[0], self.linear_1[2]
        with without_autocast(place.t):
            h = _exact(self.linear_0, self.coordinates(place, size)).sin()
            scale, shift = _exact(last, F.silu(_exact(first, h))).permute(0, 3, 1, 2).chunk(2, dim=1)
        return scale, shift

    def forward(self, x: Tensor, steer: Place | Maps) -> Tensor:
        """x (b, C, h, w) -> (b, C, h, w), at a place or with the maps of one."""
        scale, shift = self.maps(steer, (x.shape[2], x.shape[3])) if isinstance(steer, Place) else steer
        return self.out_rest(self.out_norm(x) * (1 + scale) + shift)


def _line(count: int, device: torch.device) -> Tensor:
    """`count` numbers from -1 to 1, both ends included; one is -1."""
    return torch.linspace(-1, 1, count, device=device)


def _exact(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in float32 at least, whatever its weights are kept in."""
    assert isinstance(layer, nn.Linear)
    kind = torch.promote_types(layer.weight.dtype, torch.float32)
    return F.linear(x.to(kind), layer.weight.to(kind), layer.bias.to(kind))


class PosResBlock(nn.Module):
    """Norm, SiLU, convolution, then PosGN, around a skip."""

    def __init__(self, before: int, after: int, steps: int, frames: int, kind: Resample = "") -> None:
        super().__init__()
        self.kind: Resample = kind
        self.in_layers = nn.Sequential(group_norm(before), nn.SiLU(), conv(2, before, after))
        self.emb_layers = PosGN(after, steps, frames)
        self.skip_connection = nn.Identity() if before == after else Pointwise(2, before, after)

    def size_after(self, size: Size) -> Size:
        """Sides of the output."""
        h, w = resampled_sides(size, self.kind, 2)
        return h, w

    def forward(self, x: Tensor, steer: Place | Maps) -> Tensor:
        """x (b, before, h, w) -> (b, after, h, w), with halved or doubled sides where the block does that."""
        norm, activation, convolution = self.in_layers
        h = convolution(laid_out(resample(activation(norm(x)), self.kind, (2, 2))))
        return self.skip_connection(resample(x, self.kind, (2, 2))) + self.emb_layers(h, steer)


class PosStage(nn.Module):
    """One block of a UNet: residual blocks with PosGN, attention, convolutions."""

    float32 = True
    """Where weights are sharded they come as they are kept: PosGN's MLP needs them so. Autocast rounds those of the others."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.modules)
        self.level = layers.level

    def maps(self, place: Place, size: Size) -> list[Maps]:
        """Maps of the stage's PosGN modules in order; `size`: sides of the network's pictures."""
        sides = (size[0] >> self.level, size[1] >> self.level)
        found = []
        for layer in self.layers:
            if isinstance(layer, PosResBlock):
                sides = layer.size_after(sides)
                found.append(layer.emb_layers.maps(place, sides))
        return found

    def forward(self, x: Tensor, steer: Place | Sequence[Maps], skip: Tensor | None = None) -> Tensor:
        """x (b, C, h, w), what was skipped to put beside x -> (b, C', h', w'). At a place the maps are worked out here.

        That is how training runs: a stage that is computed again, or sharded, then has the MLPs' work and weights inside.
        """
        x, taken = x if skip is None else torch.cat([x, skip], dim=1), 0
        for layer in self.layers:
            if isinstance(layer, PosResBlock):
                x = layer(x, steer if isinstance(steer, Place) else steer[taken])
                taken += 1
            else:
                x = layer(x)
        return x
