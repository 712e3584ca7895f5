"""Blocks of the UNets of image diffusion: residual blocks steered by a vector, attention, resampling (spec, pvdm.md section 3).

Letters: B batch, C channels, S the 1 to 3 axes of a picture, E width of the steering vector, N positions.

Several pictures of equal width may lie on one sheet, one above the other along the first axis of S: `rows` are their heights. They are
convolved in one call with empty rows between them, and normalised and attended each for itself, so that each gets exactly what it
would get alone. Without `rows` there is one picture. State names are those of the common releases.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import sdpa
from models.layers.convolution import Conv3d, laid_out, layout

Rows = tuple[int, ...]
Resample = Literal["", "down", "up"]
GROUPS = 32
"""Groups of every group norm: all widths are multiples of it."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONV: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: Conv3d}
_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def conv(dims: int, before: int, after: int, kernel: int = 3, stride: int | Sequence[int] = 1) -> Convolution:
    """A convolution over 1 to 3 axes that keeps the sides, or divides them by the stride."""
    return _CONV[dims](before, after, kernel, stride, padding=kernel // 2)  # type: ignore[arg-type]


class GroupNorm(nn.GroupNorm):
    """Group norm that is quick for bf16 features on a CPU too: with channels side by side torch's kernels take up to 12 times as long."""

    def forward(self, input: Tensor) -> Tensor:
        slow = input.dtype is torch.bfloat16 and input.device.type == "cpu" and not torch.compiler.is_compiling()
        return super().forward(input.contiguous() if slow else input)


def group_norm(width: int) -> GroupNorm:
    """Raises ValueError for a width that has no 32 groups."""
    if width % GROUPS:
        raise ValueError(f"{width} channels cannot be normalised in {GROUPS} groups: widths must be multiples of {GROUPS}")
    return GroupNorm(GROUPS, width)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all weights zero: what ends a residual branch."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def norm_each(norm: nn.Module, x: Tensor, rows: Rows) -> Tensor:
    """Group norm of each picture of a sheet (B, C, *S). Statistics are taken in float32 whatever the type, as the kernels do."""
    if len(rows) < 2:
        return norm(x)
    return torch.cat([norm(part) for part in x.split(rows, dim=2)], dim=2)


def conv_each(layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
    """A convolution of each picture of a sheet (B, C, *S), in one call: empty rows keep the pictures apart, as padding does."""
    assert isinstance(layer, Convolution)
    if len(rows) < 2 or layer.kernel_size[0] == 1:
        return layer(laid_out(x))
    step = layer.stride[0]  # as many empty rows as a step, so that every picture starts on one
    gap = x.new_zeros(*x.shape[:2], step, *x.shape[3:]).to(memory_format=layout(x))
    parts = [piece for part in x.split(rows, dim=2) for piece in (part, gap)][:-1]
    sizes = [size for height in rows for size in (height // step, 1)][:-1]
    return torch.cat(layer(laid_out(torch.cat(parts, dim=2))).split(sizes, dim=2)[::2], dim=2)


def resample(x: Tensor, kind: Resample, factors: Sequence[int]) -> Tensor:
    """(B, C, *S) averaged over cells of `factors` ("down"), repeated to them ("up"), or as it is ("")."""
    if kind == "down":
        return _POOL[len(factors)](x, tuple(factors))
    if kind == "up":
        return F.interpolate(x, scale_factor=[float(factor) for factor in factors], mode="nearest")
    return x


def resampled_sides(sides: Rows, kind: Resample, factor: int) -> Rows:
    """Sides of pictures (all their heights, or height and width of one) after `resample`."""
    return tuple(side // factor if kind == "down" else side * factor if kind == "up" else side for side in sides)


class Pointwise(nn.Module):
    """A convolution of size 1 over `dims` axes, as one product over the channels.

    The gradient of its weight lies in memory as the weight does. That of a convolution on a CPU may not: DDP copies it then, and warns.
    """

    def __init__(self, dims: int, before: int, after: int) -> None:
        super().__init__()
        like = conv(dims, before, after, kernel=1)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, *S) -> (B, after, *S), with the channels last in memory."""
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip; the vector shifts and scales (or shifts) between the two."""

    def __init__(
        self,
        before: int,
        after: int,
        emb: int,
        dims: int = 2,
        *,
        kind: Resample = "",
        factors: Sequence[int] = (),
        scale_shift: bool = True,
        dropout: float = 0.0,
    ) -> None:
        """`kind` resamples by `factors`, one for each axis (default: all 2)."""
        super().__init__()
        self.kind: Resample = kind
        self.factors = tuple(factors) or (2,) * dims
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(group_norm(before), nn.SiLU(), conv(dims, before, after))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * after if scale_shift else after))
        self.out_layers = nn.Sequential(group_norm(after), nn.SiLU(), nn.Dropout(dropout), zeroed(conv(dims, after, after)))
        self.skip_connection = nn.Identity() if before == after else Pointwise(dims, before, after)

    def forward(self, x: Tensor, emb: Tensor, rows: Rows = ()) -> Tensor:
        """x (B, before, *S), emb (B, E) -> (B, after, *S), resampled where the block does that."""
        norm, activation, first = self.in_layers
        h = resample(activation(norm_each(norm, x, rows)), self.kind, self.factors)
        x, rows = resample(x, self.kind, self.factors), self.rows_after(rows)
        h = conv_each(first, h, rows)
        steer = self.emb_layers(emb)[(..., *[None] * len(self.factors))]  # (B, after or 2 after, 1 ...)
        norm, activation, dropout, second = self.out_layers
        if self.scale_shift:
            scale, shift = steer.chunk(2, dim=1)
            h = norm_each(norm, h, rows) * (1 + scale) + shift
        else:
            h = norm_each(norm, h + steer, rows)
        return self.skip_connection(x) + conv_each(second, dropout(activation(h)), rows)

    def rows_after(self, rows: Rows) -> Rows:
        return resampled_sides(rows, self.kind, self.factors[0])


class AttentionBlock(nn.Module):
    """Norm and multi-head self-attention over all positions of a picture, around a skip."""

    def __init__(self, channels: int, heads: int, new_order: bool = False) -> None:
        """`new_order`: the outputs of `qkv` are all queries, then all keys and all values, instead of those of each head in turn."""
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be cut into {heads} heads")
        self.heads = heads
        self.new_order = new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, rows: Rows = ()) -> Tensor:
        """(B, C, *S) -> (B, C, *S), each picture of a sheet for itself."""
        tokens = x.flatten(2).transpose(1, 2)  # a view in either layout
        lengths = tuple(height * (tokens.shape[1] // x.shape[2]) for height in rows)
        return self.attend(tokens, lengths).transpose(1, 2).unflatten(2, x.shape[2:])

    def attend(self, tokens: Tensor, lengths: Rows = ()) -> Tensor:
        """(B, N, C) -> (B, N, C); `lengths`: several sequences one after the other that do not see each other."""
        h = norm_each(self.norm, tokens.transpose(1, 2).unsqueeze(3), lengths)  # (B, C, N, 1)
        qkv = self.qkv(h.squeeze(3).transpose(1, 2))
        qkv = qkv.unflatten(2, (3, self.heads, -1)).transpose(2, 3) if self.new_order else qkv.unflatten(2, (self.heads, 3, -1))
        parts = qkv.split(lengths, dim=1) if len(lengths) > 1 else (qkv,)
        heads = [sdpa(*part.permute(3, 0, 2, 1, 4).unbind(0)).transpose(1, 2).flatten(2) for part in parts]  # (B, n, C) each
        return tokens + self.proj_out(heads[0] if len(heads) == 1 else torch.cat(heads, dim=1))


class Downsample(nn.Module):
    """A convolution of stride 2 (or of `factors`)."""

    def __init__(self, channels: int, dims: int = 2, factors: Sequence[int] = ()) -> None:
        super().__init__()
        self.factors = tuple(factors) or (2,) * dims
        self.op = conv(dims, channels, channels, stride=self.factors)

    def forward(self, x: Tensor, rows: Rows = ()) -> Tensor:
        return conv_each(self.op, x, rows)

    def rows_after(self, rows: Rows) -> Rows:
        return resampled_sides(rows, "down", self.factors[0])


class Upsample(nn.Module):
    """Each position repeated, then a convolution."""

    def __init__(self, channels: int, dims: int = 2, factors: Sequence[int] = ()) -> None:
        super().__init__()
        self.factors = tuple(factors) or (2,) * dims
        self.conv = conv(dims, channels, channels)

    def forward(self, x: Tensor, rows: Rows = ()) -> Tensor:
        return conv_each(self.conv, resample(laid_out(x), "up", self.factors), self.rows_after(rows))

    def rows_after(self, rows: Rows) -> Rows:
        return resampled_sides(rows, "up", self.factors[0])
