"""Small tables of what a sample is, each added to the vector of the step: the task, the bin of its dynamics, its frame stride.

A table starts at zero and one of its rows stands for "not told", so that a network with tables begins as the network without.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NO_TASK, FROM_CLIP, FROM_IMAGE = 0, 1, 2
"""Rows of the table of tasks: what the second input holds. Nothing; the latent of the clip before; that of a still picture."""
TASKS = 3


@dataclass(frozen=True)
class TableConfig:
    """Which tables a network has."""

    tasks: bool = False
    """The network is told what its second input holds: nothing, the previous clip or a still picture."""
    dynamics_bins: int = 0
    """Bins of the dynamics that the network is told; 0: none."""
    strides: int = 0
    """Frame strides that the network is told; 0: none."""

    def __post_init__(self) -> None:
        for name in ("dynamics_bins", "strides"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: at least 0, which is no table")


class Table(nn.Embedding):
    """Index -> vector, zero at first; `null` is the row of what is not told. A state dict without it loads as zeros."""

    def __init__(self, rows: int, dim: int, null: int) -> None:
        super().__init__(rows, dim)
        self.null = null
        self.register_load_state_dict_pre_hook(_zeros_if_missing)

    def reset_parameters(self) -> None:
        """Zeros, and no random number drawn: the rest of the network starts as it would without the table."""
        nn.init.zeros_(self.weight)

    def rows_of(self, index: Tensor | None, batch: int) -> Tensor:
        """(B,) indices, or None for "not told" -> (B, D)."""
        return self.weight[self.null].expand(batch, -1) if index is None else self(index)


def tables(config: TableConfig, dim: int) -> dict[str, Table | None]:
    """The tables that a config asks for, by the names they have in state dicts."""
    return {
        "task_emb": Table(TASKS, dim, NO_TASK) if config.tasks else None,
        "dynamics_emb": Table(config.dynamics_bins + 1, dim, config.dynamics_bins) if config.dynamics_bins else None,
        "stride_emb": Table(config.strides + 1, dim, config.strides) if config.strides else None,
    }


def add_told(emb: Tensor, **told: tuple[Table | None, Tensor | None]) -> Tensor:
    """(B, D) plus, for each name, the rows of its table at its indices (B,).

    Raises ValueError for indices that the network has no table for.
    """
    for name, (table, index) in told.items():
        if table is not None:
            emb = emb + table.rows_of(index, len(emb))
        elif index is not None:
            raise ValueError(f"{name}: the model has no table for it")
    return emb


def _zeros_if_missing(module: Table, state: dict[str, Any], prefix: str, *_: object) -> None:
    state.setdefault(f"{prefix}weight", torch.zeros(module.weight.shape, dtype=module.weight.dtype))
