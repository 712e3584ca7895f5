"""Frechet distance of two sets of feature vectors, each taken as a Gaussian, in double precision and in one pass over each set."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

_LEAST_SLAB = 1024
_BLOCK = 64


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
        if not dist.is_available() or not dist.is_initialized():
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
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by eigenvalues of symmetric matrices: no complex numbers, no root of a matrix.

    With S1 = R R^T the last trace is that of (R^T S2 R)^(1/2). Of a set of fewer vectors than numbers R is made of them, so that what is
    zero stays zero; of two such sets the trace is the nuclear norm of R1^T R2. Small sets give large values, equal distributions too:
    only numbers of equal set sizes compare. `unbiased`: covariances over n - 1, else over n. The published code does this in float32
    and is off by 1e-3 of the value, more where a few features dominate.
    """
    divisors = [moments.divisor(unbiased=unbiased) for moments in (first, second)]
    means = [moments.mean.cpu().numpy() for moments in (first, second)]
    apart = float(np.square(means[0] - means[1]).sum())
    few = [_few_rows(moments, divisor) for moments, divisor in zip((first, second), divisors, strict=True)]
    if few[0] is not None and few[1] is not None:
        cross = np.linalg.svd(few[0] @ few[1].T, compute_uv=False).sum()
        return apart + float(np.square(few[0]).sum() + np.square(few[1]).sum() - 2 * cross)
    one, two = (0, 1) if few[1] is None else (1, 0)
    other = _covariance((first, second)[two], divisors[two])
    if (rows := few[one]) is not None:
        variances = np.square(rows).sum() + np.trace(other)
        inner: Array = rows @ other @ rows.T
    else:
        own = _covariance((first, second)[one], divisors[one])
        variances = np.trace(own) + np.trace(other)
        inner = _inner(own, other)
    cross = np.sqrt(np.linalg.eigvalsh(inner, UPLO="L").clip(min=0)).sum()
    return apart + float(variances - 2 * cross)


def _covariance(moments: Moments, divisor: int) -> Array:
    found: Array = moments.scatter.cpu().numpy() / divisor
    return found


def _few_rows(moments: Moments, divisor: int) -> Array | None:
    """Centred rows X of a set that has fewer of them than numbers, scaled: its covariance is X^T X. None for another set."""
    if moments.rows is None or moments.n >= moments.dim:
        return None
    rows = moments.rows.cpu().numpy()
    return (rows - rows.mean(axis=0)) / divisor**0.5


def _inner(own: Array, other: Array) -> Array:
    """R^T S R with S = other, which is overwritten, and own = R R^T; only its lower triangle counts.

    R is triangular where the covariance has no zeros, for eigenvectors take longer. Then its blocks that are zero, and blocks of the
    result above the diagonal, are left out of the products: two fifths of them remain.
    """
    try:
        root = np.linalg.cholesky(own)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(own)
        root = vectors * np.sqrt(values.clip(min=0))
        return root.T @ other @ root
    for left in range(0, len(root), _BLOCK):
        columns = slice(left, left + _BLOCK)
        half = other[left:, left:] @ root[left:, columns]
        for top in range(left, len(root), _BLOCK):
            rows = slice(top, top + _BLOCK)
            other[rows, columns] = root[top:, rows].T @ half[top - left :]  # blocks further right need none of these columns
    return other
