"""What the UNets share: the order of their stages, how a stage runs through its layers, the output.

Letters: B batch, C channels, S the axes of a picture or a volume, E width of the steering vector. `rows` are the heights of the pictures
on a sheet (see adm.py); a volume has none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.unets.adm import (
    GROUPS,
    AttentionBlock,
    Downsample,
    Resample,
    ResBlock,
    Rows,
    Upsample,
    conv,
    conv_each,
    group_norm,
    norm_each,
    zeroed,
)


class UNetSettings(Protocol):
    """What a config says of the stages."""

    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def num_res_blocks(self) -> int: ...
    @property
    def resblock_updown(self) -> bool: ...


class ResidualSettings(Protocol):
    """What a config says of residual blocks that a vector steers."""

    @property
    def model_channels(self) -> int: ...
    @property
    def use_scale_shift_norm(self) -> bool: ...
    @property
    def dropout(self) -> float: ...


Residual = Callable[[int, int, Resample], nn.Module]
"""Makes a residual block: width before, width after, how it resamples."""


def steered(config: ResidualSettings, factors: Sequence[int]) -> Residual:
    """Residual blocks steered by a vector of width 4 model_channels."""

    def residual(before: int, after: int, kind: Resample) -> nn.Module:
        emb, dims = 4 * config.model_channels, len(factors)
        scale_shift, dropout = config.use_scale_shift_norm, config.dropout
        return ResBlock(before, after, emb, dims, kind=kind, factors=factors, scale_shift=scale_shift, dropout=dropout)

    return residual


class Layers(NamedTuple):
    """The layers of one stage, which starts with the sides of `level`."""

    modules: list[nn.Module]
    level: int


class Plan:
    """Builds the layers of the stages in order, keeping count of widths: down, middle and up, each once."""

    def __init__(
        self,
        config: UNetSettings,
        factors: Sequence[int],
        residual: Residual,
        attention: Callable[[int], list[nn.Module]] | None = None,
    ) -> None:
        """`factors`: how much smaller the sides of the next level are, one for each axis. `attention`: what a level has of it."""
        self._config = config
        self._factors = tuple(factors)
        self._residual = residual
        self._inside = attention or (lambda level: [])
        self._width = config.widths[0]
        self._skips: list[int] = []

    def down(self, channels: int) -> Iterator[Layers]:
        """The input stages, over pictures of that many channels. The first is a convolution."""
        config, dims = self._config, len(self._factors)
        yield self._stage([conv(dims, channels, self._width)], 0)
        self._skips.append(self._width)
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                yield self._stage([self._residual(self._width, width, ""), *self._inside(level)], level)
                self._skips.append(width)
            if level + 1 < len(config.widths):
                updown = config.resblock_updown
                yield self._stage([self._residual(width, width, "down") if updown else Downsample(width, dims, self._factors)], level)
                self._skips.append(width)

    def middle(self, between: Sequence[nn.Module] = ()) -> Layers:
        """Two residual blocks with `between` between them."""
        width, last = self._width, len(self._config.widths) - 1
        return self._stage([self._residual(width, width, ""), *between, self._residual(width, width, "")], last)

    def up(self) -> Iterator[Layers]:
        """The output stages. The last of each level but the first has the sides of the next one at its end."""
        config, dims = self._config, len(self._factors)
        for level, width in reversed(list(enumerate(config.widths))):
            for k in range(config.num_res_blocks + 1):
                layers = [self._residual(self._width + self._skips.pop(), width, ""), *self._inside(level)]
                if level and k == config.num_res_blocks:
                    updown = config.resblock_updown
                    layers.append(self._residual(width, width, "up") if updown else Upsample(width, dims, self._factors))
                yield self._stage(layers, level)

    def _stage(self, modules: list[nn.Module], level: int) -> Layers:
        self._width = self._config.widths[level]
        return Layers(modules, level)


def run_layers(layers: Iterable[nn.Module], x: Tensor, emb: Tensor, rows: Rows = ()) -> Tensor:
    """(B, C, *S) and emb (B, E) through the layers of a stage."""
    for layer in layers:
        if isinstance(layer, ResBlock):
            x, rows = layer(x, emb, rows), layer.rows_after(rows)
        elif isinstance(layer, Downsample | Upsample):
            x, rows = layer(x, rows), layer.rows_after(rows)
        elif isinstance(layer, AttentionBlock):
            x = layer(x, rows)
        else:
            x = conv_each(layer, x, rows)
    return x


class Stage(nn.Module):
    """One block of a UNet over one picture or volume."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.modules)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, *S), emb (B, E), what was skipped to put beside x -> (B, C', *S')."""
        return run_layers(self.layers, x if skip is None else torch.cat([x, skip], dim=1), emb)


class Head(nn.Module):
    """Norm, SiLU and the convolution to the output, which starts at zero."""

    def __init__(self, width: int, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.conv = zeroed(conv(dims, width, channels))

    def forward(self, x: Tensor, rows: Rows = ()) -> Tensor:
        """(B, width, *S) -> (B, channels, *S)."""
        return conv_each(self.conv, F.silu(norm_each(self.norm, x, rows)), rows)


def check_halvings(sides: Mapping[str, Sequence[int]], levels: int) -> None:
    """Raises ValueError for sides, by the names of their settings, that cannot be halved from level to level."""
    times = 2 ** (levels - 1)
    for name, values in sides.items():
        if any(value % times for value in values):
            size = " x ".join(map(str, values))
            raise ValueError(
                f"{name} {size} cannot be halved {levels - 1} times: use multiples of {times}, or fewer entries in "
                f"channel_mult ({levels} now)"
            )


def check_widths(model_channels: int, channel_mult: Sequence[float]) -> None:
    """Raises ValueError for a level whose width cannot be normalised in groups."""
    for times in channel_mult:
        if int(model_channels * times) % GROUPS or model_channels * times < 1:
            raise ValueError(f"model_channels {model_channels} x {times} is not a multiple of {GROUPS}")


def check_rates(attention_resolutions: Sequence[int]) -> None:
    """Raises ValueError for a level that no UNet has: they are named by how many times smaller their sides are."""
    if unknown := [times for times in attention_resolutions if times < 1 or times & (times - 1)]:
        raise ValueError(f"attention_resolutions {unknown[0]}: the levels are 1, 2, 4, 8 ... times smaller")
