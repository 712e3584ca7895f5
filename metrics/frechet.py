"""Frechet distance of two sets of feature vectors, each taken as a Gaussian, in double precision and in one pass over each set."""

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Number, mean and scatter sum (x - mean)(x - mean)^T of feature vectors, float64, kept up to date batch by batch.

    Centred sums (Chan et al. 1979) lose no digits to a large mean; what a rank has seen may differ in size from what others have.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Adds rows (k, dim). ValueError for another shape, or for numbers that are not finite: one would spoil all."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features {list(features.shape)}: (any, {len(self.mean)}) is wanted")
        if not len(features):
            return
        if not features.isfinite().all():
            raise ValueError("features that are not finite: the videos or the network that they came from are broken")
        rows = features.to(self.mean)
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Adds all that another one has seen."""
        if other.n:
            self._add(other.n, other.mean.to(self.mean), other.scatter.to(self.scatter))

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total, apart = self.n + n, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.n * n / total)
        self.mean = self.mean + apart * (n / total)
        self.n = total

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Every rank comes to hold the moments of all ranks' vectors. To be called by all, also by one that has seen nothing."""
        if not dist.is_available() or not dist.is_initialized():
            return
        weighted = torch.cat([self.mean.new_tensor([self.n]), self.n * self.mean])
        dist.all_reduce(weighted, group=group)
        total = int(weighted[0])
        mean = weighted[1:] / max(total, 1)
        apart = self.mean - mean
        scatter = self.scatter + self.n * torch.outer(apart, apart)
        dist.all_reduce(scatter, group=group)
        self.n, self.mean, self.scatter = total, mean, scatter

    def covariance(self) -> Tensor:
        """The unbiased covariance, (dim, dim). ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"{self.n} feature vectors: a covariance needs at least 2")
        return self.scatter / (self.n - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with two symmetric eigenvalue problems and no complex numbers.

    With S1 = R R^T the last trace is that of (R^T S2 R)^(1/2). Small sets give large values, equal distributions too: only numbers of
    equal set sizes compare. The published code does this in float32 and is off by 1e-3 of the value, more where a few features dominate.
    """
    one, two = first.covariance(), second.covariance().to(first.mean)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt()
    product = root.T @ two @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean.to(first.mean)).square().sum()
    return float(apart + one.trace() + two.trace() - 2 * cross)
