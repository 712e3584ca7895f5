"""Parts of the plane UNet that know of several planes: a stage, which mixes them at its end, and the output.

Letters: B batch, C channels, L positions of the planes together, E width of the steering vector. Planes of equal width lie on one
sheet, one above the other (see adm.py).
"""

import torch
from torch import Tensor, nn

from models.unets.adm import AttentionBlock, Rows
from models.unets.stages import Head, run_layers

Sheets = tuple[Tensor, ...]


class Stage(nn.Module):
    """One block of the UNet: layers on each plane, then attention across the planes."""

    def __init__(self, layers: list[nn.Module], across: AttentionBlock | None, rows: tuple[Rows, ...]) -> None:
        """`rows`: heights of the planes of each sheet that comes in."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.across = across
        self.rows = rows

    def forward(self, sheets: Sheets, emb: Tensor, skips: Sheets = ()) -> Sheets:
        """Sheets (B, C, rows, columns), emb (B, E), skipped sheets to put beside them -> sheets."""
        if skips:
            sheets = tuple(torch.cat(pair, dim=1) for pair in zip(sheets, skips, strict=True))
        sheets = tuple(run_layers(self.layers, x, emb, rows) for x, rows in zip(sheets, self.rows, strict=True))
        return sheets if self.across is None else attend_across(self.across, sheets)


def attend_across(block: AttentionBlock, sheets: Sheets) -> Sheets:
    """Attention over all positions of all planes as one sequence."""
    if len(sheets) == 1:
        return (block(sheets[0]),)
    lengths = [x.shape[2] * x.shape[3] for x in sheets]
    tokens = block.attend(torch.cat([x.flatten(2).transpose(1, 2) for x in sheets], dim=1))
    parts = tokens.split(lengths, dim=1)
    # Copies: sharding warns of units that return views.
    return tuple(part.clone().transpose(1, 2).unflatten(2, x.shape[2:]) for part, x in zip(parts, sheets, strict=True))


class PlaneHead(Head):
    """The output of every plane."""

    def __init__(self, width: int, channels: int, rows: tuple[Rows, ...]) -> None:
        super().__init__(width, channels)
        self.rows = rows

    def forward(self, sheets: Sheets) -> Tensor:  # type: ignore[override]
        """Sheets -> (B, channels, L)."""
        parts = [super(PlaneHead, self).forward(x, rows) for x, rows in zip(sheets, self.rows, strict=True)]
        return torch.cat([part.flatten(2) for part in parts], dim=2)
