"""Rotary position tables: channel pairs (2i, 2i + 1) of queries and keys are turned by an angle that grows with the position.

Tables are made in each forward pass from sizes alone (a few hundred numbers), so there are no buffers to save, shard or materialise.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
"""(cosines, sines), each (N, E'), E' <= head width; the channels beyond E' are left alone."""


TimeLayout = Literal["pairs", "halves"]


def time_tables(frames: int, width: int, device: torch.device, layout: TimeLayout = "pairs") -> Tables:
    """1-D tables for `frames` integer positions: angles p * 10000^(-2i / E') on pair i.

    "halves" is PVDM's and HVDM's table (spec, pvdm.md section 2.1): channel j has the angle of pair j mod E'/2, so that the two channels
    of a pair turn by different angles. That is no rotation, but the released weights were trained with it.
    """
    used = width // 2 * 2
    angles = torch.arange(frames, device=device, dtype=torch.float32)[:, None] * time_rates(used, device)  # (T, E'/2)
    if layout == "halves":
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()
    return _tables(angles)


def time_rates(width: int, device: torch.device) -> Tensor:
    """(E'/2,): radians a frame of each pair."""
    return 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def grid_scales(count: int, device: torch.device) -> Tensor:
    """(count,): frequencies spaced evenly in the logarithm from 1 to 5."""
    return 2.0 ** torch.linspace(0.0, math.log2(5.0), count, device=device)


def grid_tables(rows: int, columns: int, width: int, device: torch.device) -> Tables:
    """Axial tables for a row-major grid: the first half of the pairs turns with the row, the second with the column.

    Positions run from -1 to 1 on both axes, times pi times frequencies spaced evenly in the logarithm from 1 to 5.
    """
    count = width // 4
    scale = math.pi * grid_scales(count, device)
    row = torch.linspace(-1.0, 1.0, rows, device=device)[:, None, None] * scale  # (R, 1, E'/4)
    column = torch.linspace(-1.0, 1.0, columns, device=device)[None, :, None] * scale  # (1, C, E'/4)
    angles = torch.cat([row.expand(rows, columns, count), column.expand(rows, columns, count)], dim=-1)
    return _tables(angles.flatten(0, 1))


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """(..., N, E) with each pair of the first E' channels turned by its position's angle."""
    cos, sin = (table.to(x.dtype) for table in tables)
    used = cos.shape[-1]
    head, rest = x[..., :used], x[..., used:]
    # (a, b) -> (-b, a) with the sign in the small table: swapping the channels of a pair is half the work of making a new one.
    signed = sin.unflatten(-1, (-1, 2))
    signed = torch.stack([-signed[..., 0], signed[..., 1]], dim=-1).flatten(-2)
    swapped = head.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    head = head * cos + swapped * signed
    return head if used == x.shape[-1] else torch.cat([head, rest], dim=-1)


def _tables(angles: Tensor) -> Tables:
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()
