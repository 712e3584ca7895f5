"""Mean and spread of the tensors of a latent set, from sums that each shard keeps in its offset index."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Moments:
    """Sums over the stored values of one shard, correctly rounded whatever the order of the samples and of their memory."""

    shapes: dict[str, list[int]] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)
    squares: dict[str, list[float]] = field(default_factory=dict)

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """Counts the tensors of one sample."""
        for name, value in tensors.items():
            wide = np.ascontiguousarray(value, dtype=np.float64)  # numpy adds in the order of memory, which convolutions choose
            self.shapes[name] = list(value.shape)
            self.sums.setdefault(name, []).append(float(wide.sum()))
            self.squares.setdefault(name, []).append(float(np.square(wide).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Name -> shape, number of samples, sum of the values and of their squares."""
        return {
            name: {"shape": shape, "samples": len(self.sums[name])}
            | {"sum": math.fsum(self.sums[name]), "squares": math.fsum(self.squares[name])}
            for name, shape in self.shapes.items()
        }


def statistics(shards: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `to_dict` gave for each shard -> tensors (shapes), mean, std and scale = 1 / std over all values, each by tensor name."""
    found: dict[str, dict[str, Any]] = {"tensors": {}, "mean": {}, "std": {}, "scale": {}}
    for name in sorted({name for shard in shards for name in shard}):
        parts = [shard[name] for shard in shards if name in shard]
        shape = parts[0]["shape"]
        count = sum(part["samples"] for part in parts) * math.prod(shape)
        mean = math.fsum(part["sum"] for part in parts) / count
        std = math.sqrt(max(0.0, math.fsum(part["squares"] for part in parts) / count - mean * mean))
        values = {"tensors": shape, "mean": mean, "std": std, "scale": 1 / std if std else 1.0}
        for key, value in values.items():
            found[key][name] = value
    return found


def posterior_statistics(shards: Sequence[dict[str, Any]], scale: float = 0.0) -> dict[str, float]:
    """Mean and std of latents drawn from the posteriors, and the scale and shift that training uses: 1 / std and the mean, or the
    `scale` that is given, and 0.

    `shards`: what `to_dict` gave for each, of the posteriors' `mean` and `std`, or of one draw from each, `sample`. The variance of a
    draw is that of the means and the mean of the variances.
    """
    found = statistics(shards)
    drawn = "mean" if "mean" in found["mean"] else "sample"
    mean, variance = found["mean"][drawn], found["std"][drawn] ** 2
    if drawn == "mean":
        variance += found["mean"]["std"] ** 2 + found["std"]["std"] ** 2
    std = math.sqrt(variance)
    measured = {"mean": mean, "std": std}
    return measured | ({"scale": scale, "shift": 0.0} if scale else {"scale": 1 / std if std else 1.0, "shift": mean})
