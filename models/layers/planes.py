"""Three planes of a clip: the projection of its tokens, and the flat sequence that latents are stored and denoised as.

Plane "xy" keeps (rows, columns), "yt" (frames, columns), "xt" (frames, rows): the names are those of the PVDM release's tensors.
Letters: B clips, T frames, H' W' rows and columns of tokens, d width, L = H'W' + TW' + TH' positions of a flat latent.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import SelfAttention

Axis = Literal["xy", "yt", "xt"]
Shapes = Sequence[tuple[int, int]]
PLANES: tuple[Axis, ...] = ("xy", "yt", "xt")

_SEQUENCE = {"xy": (1, 2, 3, 0, 4), "yt": (1, 0, 3, 2, 4), "xt": (1, 0, 2, 3, 4)}
"""Plane -> the order that brings (T, B, H', W', d) to (B, rows, columns, collapsed axis, d)."""


def plane_shapes(frames: int, grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of xy, yt, xt."""
    return grid, (frames, grid[1]), (frames, grid[0])


def split_planes(x: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """(B, C, L) -> planes (B, C, rows, columns), views. Raises ValueError when L is not what the shapes add up to."""
    sizes = [rows * columns for rows, columns in shapes]
    if x.dim() != 3 or x.shape[2] != sum(sizes):
        raise ValueError(f"planes {', '.join(f'{r} x {c}' for r, c in shapes)} make (b, c, {sum(sizes)}), not {tuple(x.shape)}")
    return tuple(part.unflatten(2, shape) for part, shape in zip(x.split(sizes, dim=2), shapes, strict=True))


def join_planes(*planes: Tensor) -> Tensor:
    """Planes (B, C, rows, columns) -> (B, C, L)."""
    return torch.cat([plane.flatten(2) for plane in planes], dim=2)


class ProjectionLayer(nn.Module):
    """Pre-norm residual layer: attention, then linear - GELU - linear."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, head_dim, qkv_bias=False)
        self.ff_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, mlp_dim)
        self.down = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        return self._feed_forward(x + self.attn(self.attn_norm(x)))

    def read(self, x: Tensor, position: int) -> Tensor:
        """(B, N, d) -> (B, d): what `forward` gives at one position, without the work for the others."""
        return self._feed_forward(x[:, position] + self.attn.read(self.attn_norm(x), position))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.ff_norm(x))))


class PlaneProjection(nn.Module):
    """Collapses one axis of a clip's tokens: a transformer along it, read out at one position (spec, pvdm.md section 2.2).

    A learned token follows the features. The release reads the first feature's position instead of it ("first"), which its weights need.
    """

    def __init__(self, axis: Axis, length: int, dim: int, depth: int, heads: int, head_dim: int, mlp_dim: int, readout: str) -> None:
        """`length`: size of the collapsed axis."""
        super().__init__()
        if depth < 1:
            raise ValueError(f"a projection needs at least one layer, not {depth}")
        self.axis: Axis = axis
        self.position = 0 if readout == "first" else length
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, length + 1, dim))
        self.layers = nn.ModuleList(ProjectionLayer(dim, heads, head_dim, mlp_dim) for _ in range(depth))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(T, B, H'W', d) -> the plane (B, rows, columns, d)."""
        x = tokens.unflatten(2, grid).permute(_SEQUENCE[self.axis])  # (B, rows, columns, n, d)
        token = self.token.to(x.dtype).expand(*x.shape[:3], 1, -1)
        shape = x.shape[:3]
        x = (torch.cat([x, token], dim=3) + self.positions.to(x.dtype)).flatten(0, 2)  # (B rows columns, n + 1, d)
        for layer in self.layers[:-1]:
            x = layer(x)
        # A copy, of one position in many: sharding warns of units that return views.
        return self.last.read(x, self.position).unflatten(0, shape).clone()

    @property
    def last(self) -> ProjectionLayer:
        """The layer that is computed at one position only."""
        layer = self.layers[-1]
        assert isinstance(layer, ProjectionLayer)
        return layer


def spread_planes(xy: Tensor, yt: Tensor, xt: Tensor) -> Tensor:
    """Planes (B, rows, columns, d) -> their sum over the clip, tokens (T, B, H'W', d)."""
    motion = yt.transpose(0, 1)[:, :, None] + xt.transpose(0, 1)[:, :, :, None]  # (T, B, H', W', d)
    return (motion + xy).flatten(2, 3)
