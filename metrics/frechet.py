"""Frechet distance of two sets of feature vectors, each taken as a Gaussian, in double precision and in one pass over each set.

Sums and distances are NumPy's and SciPy's alone: the threads of torch and those of their BLAS would wait for each other's cores.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from scipy import linalg
from scipy.linalg.blas import dsyrk
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

_LEAST_SLAB = 256
_DOUBT = 1e-7
"""Part of a distance that may be wrong before the slower way is taken. The bound is a wide one: 1e-9 was the most that was found."""


class Moments:
    """Number, mean and scatter sum (x - mean)(x - mean)^T of feature vectors, float64, kept up to date batch by batch.

    Vectors wait until there are at least as many as they have numbers, then join the sums together: the sums do not depend on the
    batches, to the last bit, and a set of few vectors is still there as vectors (`rows`), which is more exact. Centred sums lose no
    digits to a large mean; what a rank has seen may differ in size from what others have. All is kept on the CPU.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._joined = 0
        self._mean: Array = np.zeros(dim)
        self._lower: Array = np.zeros((dim, dim), order="F")  # triangle of the scatter; what is above the diagonal counts for nothing
        self._slab: Array = np.empty((0, dim))
        self._waiting = 0

    @classmethod
    def of(cls, n: int, mean: Tensor, scatter: Tensor) -> "Moments":
        """From the sums themselves: mean (dim,), scatter (dim, dim)."""
        made = cls(len(mean))
        made._joined = n
        made._mean[:] = mean.cpu()
        made._lower[:] = scatter.cpu()
        return made

    def state(self) -> dict[str, Tensor]:
        """All there is, for a file: `from_state` goes on with the same bits."""
        sums = {"mean": torch.from_numpy(self._mean), "scatter": torch.from_numpy(_whole(self._lower))} if self._joined else {}
        return {"n": torch.tensor(self._joined), "waiting": torch.from_numpy(self._slab[: self._waiting]), **sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Moments":
        """What `state` gave."""
        joined = int(state["n"])
        made = cls.of(joined, state["mean"], state["scatter"]) if joined else cls(state["waiting"].shape[1])
        made.update(state["waiting"])
        return made

    @classmethod
    def union(cls, parts: Sequence["Moments"]) -> "Moments":
        """All that they have seen together, summed up: in it vectors wait only while there are few of them."""
        made = cls(parts[0].dim)
        made._joined, made._mean, made._lower = parts[0]._joined, parts[0]._mean.copy(), parts[0]._lower.copy(order="F")
        made._take(parts[0]._slab[: parts[0]._waiting])
        for part in parts[1:]:
            made.merge(part)
        if made._joined:
            made._join()
        return made

    @property
    def n(self) -> int:
        """Vectors seen."""
        return self._joined + self._waiting

    @property
    def rows(self) -> Tensor | None:
        """The vectors themselves, (n, dim), while none has joined the sums; else None."""
        return torch.from_numpy(self._slab[: self._waiting]) if self._waiting and not self._joined else None

    @property
    def mean(self) -> Tensor:
        """(dim,)."""
        return torch.from_numpy(self.sums()[0])

    @property
    def scatter(self) -> Tensor:
        """(dim, dim)."""
        return torch.from_numpy(_whole(self.sums()[1]))

    def sums(self) -> tuple[Array, Array]:
        """Mean and scatter of all vectors, copies; of the scatter the lower triangle counts. Those that wait go on waiting."""
        lower = self._lower.copy(order="F")
        if not self._waiting:
            return self._mean.copy(), lower
        return _joined(self._joined, self._mean, lower, self._slab[: self._waiting + 1].copy())

    def update(self, features: Tensor) -> None:
        """Adds rows (k, dim). ValueError for another shape, or for numbers that are not finite: one would spoil all."""
        self._take(_checked(features, self.dim))

    def _take(self, rows: Array) -> None:
        room = max(self.dim, _LEAST_SLAB)
        if len(rows) and not len(self._slab):
            self._slab = np.empty((room + 1, self.dim))  # the last one is for `_joined`
        while len(rows):
            taken = rows[: room - self._waiting]
            self._slab[self._waiting : self._waiting + len(taken)] = taken
            self._waiting, rows = self._waiting + len(taken), rows[len(taken) :]
            if self._waiting == room:
                self._join()

    def merge(self, other: "Moments") -> None:
        """Adds all that another one has seen."""
        if other._joined:
            self._join()
            self._mean, apart = _meeting(self._joined, self._mean, other._joined, other._mean)
            self._lower += other._lower
            self._lower = _with_products(self._lower, apart[None])
            self._joined += other._joined
        self._take(other._slab[: other._waiting])

    def _join(self) -> None:
        """The vectors that wait join the sums."""
        if self._waiting:
            self._mean, self._lower = _joined(self._joined, self._mean, self._lower, self._slab[: self._waiting + 1])
            self._joined, self._waiting = self.n, 0

    def covariance(self, *, unbiased: bool = True) -> Tensor:
        """(dim, dim): the scatter over n - 1, or over n. ValueError for fewer than two vectors."""
        return self.scatter / self.divisor(unbiased=unbiased)

    def divisor(self, *, unbiased: bool = True) -> int:
        """What a covariance divides by. ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"{self.n} feature vectors: a covariance needs at least 2")
        return self.n - 1 if unbiased else self.n


def update_halves(halves: tuple[Moments, Moments], features: Tensor, first: np.ndarray) -> None:
    """Adds rows (b k, dim), k of each video, to two moments: to the first those of the videos where `first`, bool (b,), is true."""
    rows = _checked(features, halves[0].dim).reshape(len(first), -1, halves[0].dim)
    for half, own in zip(halves, (first, ~first), strict=True):
        half._take(rows.compress(own, axis=0).reshape(-1, half.dim))


def _checked(features: Tensor, dim: int) -> Array:
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features {list(features.shape)}: (any, {dim}) is wanted")
    # A sum is finite only where all numbers are, and takes a tenth of the time; one that overflows says nothing.
    if not math.isfinite(features.sum()) and not features.isfinite().all():
        raise ValueError("features that are not finite: the videos or the network that they came from are broken")
    rows: Array = features.detach().to("cpu", torch.promote_types(features.dtype, torch.float32)).numpy()
    return rows


def _joined(n: int, mean: Array, lower: Array, rows: Array) -> tuple[Array, Array]:
    """Mean and scatter of n vectors and of rows (k + 1, dim), the last of which is room for how far apart both means are.

    Rows and scatter are overwritten.
    """
    own = rows[:-1]
    centre = own.mean(axis=0)
    own -= centre
    mean, rows[-1] = _meeting(n, mean, len(own), centre)
    return mean, _with_products(lower, rows)


def _meeting(n: int, mean: Array, more: int, centre: Array) -> tuple[Array, Array]:
    """Mean of n vectors and of `more`, and the vector whose square the sum of their scatters lacks (Chan et al. 1979)."""
    apart, part = centre - mean, more / (n + more)
    return mean + part * apart, (n * part) ** 0.5 * apart


def _with_products(lower: Array, rows: Array) -> Array:
    """The lower triangle of a matrix and of rows^T rows, in the memory of the matrix: half of the work of a product."""
    summed: Array = dsyrk(1.0, rows.T, 1.0, lower, lower=1, overwrite_c=1)
    return summed


def _whole(lower: Array) -> Array:
    """A symmetric matrix from its lower triangle."""
    below = np.tril(lower, -1)
    return below + below.T + np.diag(lower.diagonal())


def frechet_distance(first: Moments, second: Moments, *, unbiased: bool = True) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by symmetric matrices and singular values: no complex numbers, no root of a matrix.

    With S1 = R1 R1^T and S2 = R2 R2^T the last trace is the nuclear norm of R1^T R2. It is also the sum of the roots of the eigenvalues of
    S1 S2, which are those of R1^T S2 R1 and take less than half the time; roots of small eigenvalues have lost half of their digits, and
    where that could be seen in the distance (close or singular sets) it is the nuclear norm that is taken. Small sets give large values,
    equal distributions too: only numbers of equal set sizes compare. `unbiased`: covariances over n - 1, else over n. The published code
    does this in float32 and is off by 1e-3 of the value, more where a few features dominate.
    """
    sides = first, second
    divisors = [moments.divisor(unbiased=unbiased) for moments in sides]
    (mean, own), (other_mean, other) = (moments.sums() for moments in sides)
    spread = sum(float(lower.trace()) / divisor for lower, divisor in zip((own, other), divisors, strict=True))
    distance = float(np.square(mean - other_mean).sum()) + spread
    few = [_few_rows(moments, divisor) for moments, divisor in zip(sides, divisors, strict=True)]
    if few[0] is None and few[1] is None:
        cross, doubt = (figure / math.prod(divisors) ** 0.5 for figure in _by_eigenvalues(own, other))
        if doubt <= _DOUBT * (distance - 2 * cross):
            return distance - 2 * cross
    factors = [
        rows.T if rows is not None else _factor(moments.sums()[1] / divisor)
        for rows, moments, divisor in zip(few, sides, divisors, strict=True)
    ]
    return distance - 2 * float(linalg.svdvals(factors[0].T @ factors[1], check_finite=False).sum())


def _few_rows(moments: Moments, divisor: int) -> Array | None:
    """Centred rows X of a set that has fewer of them than numbers, scaled: its covariance is X^T X. None for another set."""
    if moments.rows is None or moments.n >= moments.dim:
        return None
    rows = moments.rows.numpy()
    scaled: Array = (rows - rows.mean(axis=0)) / divisor**0.5
    return scaled


def _factor(covariance: Array) -> Array:
    """R (dim, rank) with covariance R R^T, of which the lower triangle is given; what rounding has made of zeros is left out."""
    with suppress(linalg.LinAlgError):
        root: Array = linalg.cholesky(covariance, lower=True, check_finite=False)
        if _rounding(covariance) * root.diagonal().max() ** 2 < root.diagonal().min() ** 2:
            return root
    values, vectors = linalg.eigh(covariance, lower=True, check_finite=False)
    kept = values > _rounding(covariance) * values[-1]
    factor: Array = vectors[:, kept] * np.sqrt(values[kept])
    return factor


def _rounding(matrix: Array) -> float:
    """How small an eigenvalue, as a part of the largest, may be rounding alone."""
    return 10 * len(matrix) * float(np.finfo(matrix.dtype).eps)


def _by_eigenvalues(own: Array, other: Array) -> tuple[float, float]:
    """tr (A B)^(1/2) from the lower triangles of both, which are overwritten, and how far off it may be."""
    try:  # driver gv: of those for such products it is the fastest without vectors
        values = linalg.eigh(
            other, own, lower=True, eigvals_only=True, type=2, driver="gv", check_finite=False, overwrite_a=True, overwrite_b=True
        ).clip(min=0)
    except linalg.LinAlgError:
        return 0.0, math.inf
    error = _rounding(own) / len(own) * values[-1]
    roots = np.sqrt(values)
    return float(roots.sum()), float(np.minimum(error / np.maximum(roots, error), error**0.5).sum())
