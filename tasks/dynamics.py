"""What a denoiser is told of the motion in a clip: the class of its energy, of equally many clips each (spec, hvdm.md section 8)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.layers.motion import motion_class
from tasks.clips import on_device
from utils.rng import SampleRng


class Dynamics:
    """Classes 0 (the stillest clips) to `bins` - 1, and the index `bins` where a sample is told nothing."""

    def __init__(self, bins: int, dropout: float, edges: Sequence[float] = ()) -> None:
        """`edges`: the `bins` - 1 energies between the classes; they may be given later."""
        self.bins, self.dropout = bins, dropout
        self.edges = tuple(edges) or (0.0,) * (bins - 1)

    def told(self, energy: Tensor, rng: SampleRng) -> Tensor:
        """Indices (b,) for clips of this energy (b,): an addressed share of the samples is told nothing."""
        edges = on_device(torch.tensor(self.edges, dtype=torch.float64), energy.device)
        dropped = rng.uniform("dynamics-dropout") < self.dropout
        return torch.where(dropped, self.bins, motion_class(energy.float(), edges))

    def state(self) -> dict[str, int | float]:
        """The edges, which a run keeps as it began."""
        return {_name(place): edge for place, edge in enumerate(self.edges)}

    def load_state(self, state: Mapping[str, int | float]) -> None:
        """Takes back what `state` gave."""
        self.edges = tuple(float(state[_name(place)]) for place in range(self.bins - 1))

    def card(self) -> dict[str, Any]:
        """The edges, for an export's card."""
        return {"edges": list(self.edges)}


def _name(place: int) -> str:
    return f"dynamics_edge_{place}"
