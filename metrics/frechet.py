"""Frechet distance of two sets of feature vectors, each taken as a Gaussian, in double precision and in one pass over each set."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

_LEAST_SLAB = 1024
_BLOCK = 64
_DOUBT = 1e-9
"""Part of a distance that may be wrong before the slower way is taken."""


class _Sums:
    """Number, mean and scatter of vectors. Never changed: more vectors make new sums, in the memory of their own product."""

    def __init__(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        self.n, self.mean, self.scatter = n, mean, scatter

    def with_rows(self, rows: Tensor) -> "_Sums":
        """Rows (k, dim) too, which are overwritten."""
        mean = rows.mean(dim=0)
        rows -= mean
        return self.joined(_Sums(len(rows), mean, _gram(rows)))

    def joined(self, other: "_Sums") -> "_Sums":
        """With other sums, whose scatter is overwritten: both, and how far apart the means are (Chan et al. 1979)."""
        if not self.n:
            return other
        apart, n = other.mean - self.mean, self.n + other.n
        scatter = other.scatter.add_(self.scatter).addr_(apart, apart, alpha=self.n * other.n / n)
        return _Sums(n, self.mean + apart * (other.n / n), scatter)


def _gram(rows: Tensor) -> Tensor:
    """X^T X. NumPy sees that both factors are one matrix, and does half of the work."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)


class Moments:
    """Number, mean and scatter sum (x - mean)(x - mean)^T of feature vectors, float64, kept up to date batch by batch.

    Vectors wait until there are at least as many as they have numbers, then join the sums together: the sums do not depend on the
    batches, to the last bit, and a set of few vectors is still there as vectors (`rows`), which is more exact. Centred sums lose no
    digits to a large mean; what a rank has seen may differ in size from what others have.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        zeros = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._sums = _Sums(0, zeros.new_zeros(dim), zeros)
        self._slab = zeros.new_empty(0, dim)
        self._count = 0
        self._whole: _Sums | None = None

    @classmethod
    def of(cls, n: int, mean: Tensor, scatter: Tensor) -> "Moments":
        """From the sums themselves: mean (dim,), scatter (dim, dim)."""
        made = cls(len(mean), mean.device)
        made._sums = _Sums(n, mean.double(), scatter.double())
        return made

    def state(self) -> dict[str, Tensor]:
        """All there is, for a file: `from_state` goes on with the same bits."""
        sums = {"mean": self._sums.mean, "scatter": self._sums.scatter} if self._sums.n else {}
        return {"n": torch.tensor(self._sums.n), "waiting": self._slab[: self._count], **sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Moments":
        """What `state` gave."""
        made = cls(state["waiting"].shape[1])
        if int(state["n"]):
            made._sums = _Sums(int(state["n"]), state["mean"], state["scatter"])
        made.update(state["waiting"])
        return made

    @property
    def n(self) -> int:
        """Vectors seen."""
        return self._sums.n + self._count

    @property
    def rows(self) -> Tensor | None:
        """The vectors themselves, (n, dim), while none has joined the sums; else None."""
        return self._slab[: self._count] if self._count and not self._sums.n else None

    @property
    def mean(self) -> Tensor:
        """(dim,)."""
        return self._total().mean if (rows := self.rows) is None else rows.mean(dim=0)

    @property
    def scatter(self) -> Tensor:
        """(dim, dim)."""
        return self._total().scatter

    def _total(self) -> _Sums:
        """The sums with the vectors that wait, which go on waiting."""
        if not self._count:
            return self._sums
        if self._whole is None:
            self._whole = self._sums.with_rows(self._slab[: self._count].clone())
        return self._whole

    def update(self, features: Tensor) -> None:
        """Adds rows (k, dim). ValueError for another shape, or for numbers that are not finite: one would spoil all."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features {list(features.shape)}: (any, {self.dim}) is wanted")
        # A sum is finite only where all numbers are, and takes a tenth of the time; one that overflows says nothing.
        if not math.isfinite(features.sum()) and not features.isfinite().all():
            raise ValueError("features that are not finite: the videos or the network that they came from are broken")
        self._whole = None
        given, room = len(features), len(self._slab)
        if given and not room:
            room = max(self.dim, _LEAST_SLAB)
            self._slab = self._sums.mean.new_empty(room, self.dim)
        start = 0
        while start < given:
            count = min(given - start, room - self._count)
            self._slab[self._count : self._count + count] = features[start : start + count]
            self._count, start = self._count + count, start + count
            if self._count == room:
                self._sum_up()

    def merge(self, other: "Moments") -> None:
        """Adds all that another one has seen."""
        if other._sums.n:
            self._sum_up()
            mean, scatter = (given.to(self._sums.mean, copy=True) for given in (other._sums.mean, other._sums.scatter))
            self._sums = self._sums.joined(_Sums(other._sums.n, mean, scatter))
        self.update(other._slab[: other._count])

    def _sum_up(self) -> None:
        """The vectors that wait join the sums."""
        if self._count:
            self._sums = self._sums.with_rows(self._slab[: self._count])
            self._count, self._whole = 0, None

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Every rank comes to hold the moments of all ranks' vectors. To be called by all, also by one that has seen nothing."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return
        self._sum_up()
        sums = self._sums
        weighted = torch.cat([sums.mean.new_tensor([sums.n]), sums.n * sums.mean])
        dist.all_reduce(weighted, group=group)
        total = int(weighted[0])
        mean = weighted[1:] / max(total, 1)
        apart = sums.mean - mean
        scatter = sums.scatter + sums.n * torch.outer(apart, apart)
        dist.all_reduce(scatter, group=group)
        self._sums = _Sums(total, mean, scatter)

    def covariance(self, *, unbiased: bool = True) -> Tensor:
        """(dim, dim): the scatter over n - 1, or over n. ValueError for fewer than two vectors."""
        return self._total().scatter / self.divisor(unbiased=unbiased)

    def divisor(self, *, unbiased: bool = True) -> int:
        """What a covariance divides by. ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"{self.n} feature vectors: a covariance needs at least 2")
        return self.n - 1 if unbiased else self.n


def frechet_distance(first: Moments, second: Moments, *, unbiased: bool = True) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by symmetric matrices and singular values: no complex numbers, no root of a matrix.

    With S1 = R1 R1^T and S2 = R2 R2^T the last trace is the nuclear norm of R1^T R2. It is also the sum of the roots of the eigenvalues of
    R1^T S2 R1, which takes half the time; roots of small eigenvalues have lost half of their digits, and where that could be seen in the
    distance (close or singular sets) it is the nuclear norm that is taken. Small sets give large values, equal distributions too: only
    numbers of equal set sizes compare. `unbiased`: covariances over n - 1, else over n. The published code does this in float32 and is
    off by 1e-3 of the value, more where a few features dominate.
    """
    sides = first, second
    divisors = [moments.divisor(unbiased=unbiased) for moments in sides]
    apart = float((first.mean.cpu() - second.mean.cpu()).square().sum())
    few = [_few_rows(moments, divisor) for moments, divisor in zip(sides, divisors, strict=True)]
    covariances: list[Array] = [moments.scatter.cpu().numpy() / divisor for moments, divisor in zip(sides, divisors, strict=True)]
    variances = sum(float(np.trace(own)) for own in covariances)
    if few[0] is None and few[1] is None:
        cross, doubt = _by_eigenvalues(covariances[0], covariances[1].copy())
        distance = apart + variances - 2 * cross
        if doubt <= _DOUBT * distance:
            return distance
    factors = [rows.T if rows is not None else _factor(own) for rows, own in zip(few, covariances, strict=True)]
    cross = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    return apart + variances - 2 * float(cross)


def _few_rows(moments: Moments, divisor: int) -> Array | None:
    """Centred rows X of a set that has fewer of them than numbers, scaled: its covariance is X^T X. None for another set."""
    if moments.rows is None or moments.n >= moments.dim:
        return None
    rows = moments.rows.cpu().numpy()
    return (rows - rows.mean(axis=0)) / divisor**0.5


def _factor(covariance: Array) -> Array:
    """R (dim, rank) with covariance R R^T; what rounding has made of zeros is left out."""
    with suppress(np.linalg.LinAlgError):
        root: Array = np.linalg.cholesky(covariance)
        if _rounding(covariance) * root.diagonal().max() ** 2 < root.diagonal().min() ** 2:
            return root
    values, vectors = np.linalg.eigh(covariance)
    kept = values > _rounding(covariance) * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _rounding(matrix: Array) -> float:
    """How small an eigenvalue, as a part of the largest, may be rounding alone."""
    return 10 * len(matrix) * float(np.finfo(matrix.dtype).eps)


def _by_eigenvalues(own: Array, other: Array) -> tuple[float, float]:
    """tr (S1 S2)^(1/2), and how far off it may be. `other` is overwritten."""
    try:
        values = np.linalg.eigvalsh(_inner(np.linalg.cholesky(own), other), UPLO="L").clip(min=0)
    except np.linalg.LinAlgError:
        return 0.0, math.inf
    error = _rounding(own) / len(own) * values[-1]
    roots = np.sqrt(values)
    return float(roots.sum()), float(np.minimum(error / np.maximum(roots, error), error**0.5).sum())


def _inner(root: Array, other: Array) -> Array:
    """R^T S R with S = other, which is overwritten, and a triangular R; only the lower triangle counts.

    Blocks of R that are zero, and blocks of the result above the diagonal, are left out of the products: two fifths of them remain.
    """
    for left in range(0, len(root), _BLOCK):
        columns = slice(left, left + _BLOCK)
        half = other[left:, left:] @ root[left:, columns]
        for top in range(left, len(root), _BLOCK):
            rows = slice(top, top + _BLOCK)
            other[rows, columns] = root[top:, rows].T @ half[top - left :]  # blocks further right need none of these columns
    return other
