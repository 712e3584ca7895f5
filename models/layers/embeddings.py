"""Position tables, patches, and embeddings of timesteps, labels and vectors."""

import functools
import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

PosGrid = Literal["true", "release"]
TimeOrder = Literal["cos_sin", "sin_cos"]
GridOrder = Literal["wh", "hw"]


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """(N,) -> (N, dim) float64: [sin(p w_i) | cos(p w_i)], w_i = 10000^(-i / (dim / 2))."""
    rate = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * rate
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, grid: tuple[int, int], pos_grid: PosGrid = "true", order: GridOrder = "wh") -> Tensor:
    """Fixed position table of a row-major (rows, columns) grid, (rows * columns, dim) float32, on the CPU.

    The first half of the channels encodes the column, the second the row (spec, cmd.md section 7); `order` "hw" the other way round
    (latte.md section 2.4). "release" builds it on a square of the same token count, as the CMD release did whatever the grid.
    Computed in float64.
    Raises ValueError when `dim` is not a multiple of 4, or for "release" when the token count is not a square.
    """
    if dim % 4:
        raise ValueError(f"a 2-D position table needs a width that is a multiple of 4, not {dim}")
    rows, columns = grid
    if pos_grid == "release":
        side = math.isqrt(rows * columns)
        if side * side != rows * columns:
            raise ValueError(f"pos_grid 'release' needs a square number of tokens, not {rows} x {columns}; use pos_grid 'true'")
        rows = columns = side
    row, column = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
    first, second = (column, row) if order == "wh" else (row, column)
    table = torch.cat([sincos_1d(first.flatten(), dim // 2), sincos_1d(second.flatten(), dim // 2)], dim=1)
    return table.to(torch.float32)


def position_parameter(dim: int, grid: tuple[int, int], pos_grid: PosGrid) -> nn.Parameter:
    """`sincos_2d` as a frozen (1, N, dim) parameter: in the state dict like the official tables, never trained."""
    table = sincos_2d(dim, grid, pos_grid).to(torch.get_default_device())
    return nn.Parameter(table[None], requires_grad=False)


@functools.lru_cache(maxsize=32)
def grid_table(dim: int, grid: tuple[int, int], order: GridOrder, device: torch.device) -> Tensor:
    """`sincos_2d` of the true grid on a device, (rows * columns, dim) float32, kept: do not write to it."""
    with torch.inference_mode(False):  # what sampling asks for first, training may use
        return sincos_2d(dim, grid, order=order).to(device)


@functools.lru_cache(maxsize=32)
def frame_table(dim: int, frames: int, device: torch.device) -> Tensor:
    """Fixed position table of frames 0, 1, ... on a device, (frames, dim) float32, kept: do not write to it (latte.md section 2.4)."""
    with torch.inference_mode(False):
        return sincos_1d(torch.arange(frames, device="cpu"), dim).to(device, torch.float32)


def timestep_frequencies(t: Tensor, dim: int, max_period: float = 10000.0, order: TimeOrder = "cos_sin") -> Tensor:
    """(B,) -> (B, dim) float32: [cos(t w_i) | sin(t w_i)], or the sines first, w_i = max_period^(-i / (dim // 2)).

    An odd `dim` ends in a zero.
    """
    half = dim // 2
    rate = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rate
    halves = (angles.cos(), angles.sin()) if order == "cos_sin" else (angles.sin(), angles.cos())
    return nn.functional.pad(torch.cat(halves, dim=1), (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """Step index -> vector: 256 frequencies, linear, SiLU, linear."""

    def __init__(self, dim: int, frequencies: int = 256, order: TimeOrder = "cos_sin") -> None:
        super().__init__()
        self.frequencies = frequencies
        self.order: TimeOrder = order
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D). The frequencies are computed in float32 whatever the weights' dtype."""
        table = timestep_frequencies(t, self.frequencies, order=self.order)
        return self.mlp(table.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


class LabelEmbedder(nn.Module):
    """Class index -> vector, with one more row (index num_classes) for "no label" when labels are ever dropped."""

    def __init__(self, num_classes: int, dim: int, null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.has_null = null
        self.embedding_table = nn.Embedding(num_classes + int(null), dim)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B,) labels, `drop` (B,) bool replaces by the null label -> (B, D). Raises ValueError when there is none to drop to."""
        if drop is not None:
            self._need_null()
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)

    def null_label(self, batch: int) -> Tensor:
        """The null label's vector, (B, D). Raises ValueError when there is none."""
        self._need_null()
        return self.embedding_table.weight[self.num_classes].expand(batch, -1)

    def _need_null(self) -> None:
        if not self.has_null:
            raise ValueError("a label is needed: the model was built with class_dropout_prob 0 and has no null label")


class VectorEmbedder(nn.Module):
    """A condition vector (a text feature) -> vector by a trained linear map, with a trained vector for "none" when it is ever dropped."""

    def __init__(self, cond_dim: int, dim: int, null: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(cond_dim, dim)
        self.null = nn.Parameter(torch.zeros(dim)) if null else None

    def forward(self, cond: Tensor | None, batch: int, drop: Tensor | None = None) -> Tensor:
        """(B, cond_dim) or None (none for all) -> (B, D); `drop` (B,) bool replaces by the null vector. ValueError when there is none."""
        if cond is None:
            return self._null_vector().expand(batch, -1)
        out = self.proj(cond.to(self.proj.weight.dtype))
        return out if drop is None else torch.where(drop[:, None], self._null_vector().to(out.dtype), out)

    def _null_vector(self) -> Tensor:
        if self.null is None:
            raise ValueError("a condition vector is needed: the model was built with class_dropout_prob 0 and has no null vector")
        return self.null


class TextEmbedder(nn.Module):
    """A flattened text feature -> vector: SiLU, linear (latte.md section 2.5). "None" is a feature of zeros: no weights of its own."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.proj = nn.Linear(cond_dim, dim)

    def forward(self, cond: Tensor | None, batch: int, drop: Tensor | None = None) -> Tensor:
        """(B, ...) of cond_dim numbers each, or None (none for all) -> (B, D); `drop` (B,) bool takes features away."""
        if cond is None:
            return self.proj(self.proj.weight.new_zeros(batch, self.cond_dim))
        cond = nn.functional.silu(cond.flatten(1).to(self.proj.weight.dtype))
        return self.proj(cond if drop is None else cond.masked_fill(drop[:, None], 0.0))


class PatchEmbed(nn.Module):
    """Image -> row-major tokens by a convolution of kernel = stride = patch size."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D)."""
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)

    def frames(self, x: Tensor) -> Tensor:
        """The same for every frame of (B, C, T, h, w) -> (T, B, N, D), dense in this order, as one matrix product."""
        p, q = self.proj.kernel_size
        patches = rearrange(x.to(self.proj.weight.dtype), "b c t (r p) (s q) -> t b (r s) (c p q)", p=p, q=q)
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, rows * columns, patch * patch * C) with features ordered (p_row, p_col, channel) -> (B, C, rows * patch, columns * patch)."""
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, rows, columns, p, p, C)
    return rearrange(x, "b r c p q d -> b d (r p) (c q)")
