"""What the UNets over latents share: the order of their stages, how a stage runs through its layers, the output.

Letters: B batch, C channels, S the axes of a picture or a volume, E width of the steering vector. `rows` are the heights of the pictures
on a sheet (see adm.py); a volume has none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from models.unets.adm import (
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
    def in_channels(self) -> int: ...
    @property
    def model_channels(self) -> int: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def num_res_blocks(self) -> int: ...
    @property
    def use_scale_shift_norm(self) -> bool: ...
    @property
    def resblock_updown(self) -> bool: ...
    @property
    def conditional(self) -> bool: ...
    @property
    def dropout(self) -> float: ...


class Layers(NamedTuple):
    """The layers of one stage, which starts with the sides of `level`."""

    modules: list[nn.Module]
    level: int


class Plan:
    """Builds the layers of the stages in order, keeping count of widths: down, middle and up, each once."""

    def __init__(self, config: UNetSettings, factors: Sequence[int], attention: Callable[[int], list[nn.Module]] | None = None) -> None:
        """`factors`: how much smaller the sides of the next level are, one for each axis. `attention`: what a level has of it."""
        self._config = config
        self._factors = tuple(factors)
        self._inside = attention or (lambda level: [])
        self._width = config.widths[0]
        self._skips: list[int] = []

    def down(self) -> Iterator[Layers]:
        """The input stages. The first is a convolution."""
        config, dims = self._config, len(self._factors)
        channels = config.in_channels * (2 if config.conditional else 1)
        yield self._stage([conv(dims, channels, self._width)], 0)
        self._skips.append(self._width)
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                yield self._stage([self._residual(self._width, width), *self._inside(level)], level)
                self._skips.append(width)
            if level + 1 < len(config.widths):
                updown = config.resblock_updown
                yield self._stage([self._residual(width, width, "down") if updown else Downsample(width, dims, self._factors)], level)
                self._skips.append(width)

    def middle(self, between: Sequence[nn.Module] = ()) -> Layers:
        """Two residual blocks with `between` between them."""
        width, last = self._width, len(self._config.widths) - 1
        return self._stage([self._residual(width, width), *between, self._residual(width, width)], last)

    def up(self) -> Iterator[Layers]:
        """The output stages. The last of each level but the first has the sides of the next one at its end."""
        config, dims = self._config, len(self._factors)
        for level, width in reversed(list(enumerate(config.widths))):
            for k in range(config.num_res_blocks + 1):
                layers = [self._residual(self._width + self._skips.pop(), width), *self._inside(level)]
                if level and k == config.num_res_blocks:
                    updown = config.resblock_updown
                    layers.append(self._residual(width, width, "up") if updown else Upsample(width, dims, self._factors))
                yield self._stage(layers, level)

    def _stage(self, modules: list[nn.Module], level: int) -> Layers:
        self._width = self._config.widths[level]
        return Layers(modules, level)

    def _residual(self, before: int, after: int, kind: Resample = "") -> ResBlock:
        config, dims = self._config, len(self._factors)
        options = {"scale_shift": config.use_scale_shift_norm, "dropout": config.dropout}
        return ResBlock(before, after, 4 * config.model_channels, dims, kind=kind, factors=self._factors, **options)  # type: ignore[arg-type]


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
