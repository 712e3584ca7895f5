"""Frechet distance of two sets of feature vectors, each taken as a Gaussian, in double precision and in one pass over each set."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

_LEAST_SLAB = 256


class _Sums:
    """Number, mean and scatter of vectors. The scatter stays where it is: a large one is slow to make anew."""

    def __init__(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        self.n, self.mean, self.scatter = n, mean, scatter

    def copy(self) -> "_Sums":
        return _Sums(self.n, self.mean, self.scatter.clone())

    def add_rows(self, rows: Tensor) -> None:
        """Rows (k, dim), which are overwritten."""
        apart = self._move(len(rows), mean := rows.mean(dim=0))
        rows -= mean
        self.scatter.addmm_(rows.T, rows)
        self._spread(len(rows), apart)

    def add(self, other: "_Sums") -> None:
        apart = self._move(other.n, other.mean)
        self.scatter += other.scatter
        self._spread(other.n, apart)

    def _move(self, n: int, mean: Tensor) -> Tensor:
        """The mean once n vectors of this mean are in; returns how far apart both were."""
        apart = mean - self.mean
        self.mean = self.mean + apart * (n / (self.n + n))
        return apart

    def _spread(self, n: int, apart: Tensor) -> None:
        """What the distance of two means adds to the scatter (Chan et al. 1979)."""
        if self.n:
            self.scatter.addr_(apart, apart, alpha=self.n * n / (self.n + n))
        self.n += n


class Moments:
    """Number, mean and scatter sum (x - mean)(x - mean)^T of feature vectors, float64, kept up to date batch by batch.

    Vectors wait until there are at least as many as they have numbers, then join the sums together: the sums do not depend on the
    batches, to the last bit, and a set of few vectors is still there as vectors (`rows`), which is more exact. Centred sums lose no
    digits to a large mean; what a rank has seen may differ in size from what others have.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self._slab = max(dim, _LEAST_SLAB)
        zeros = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._sums = _Sums(0, zeros.new_zeros(dim), zeros)
        self._waiting: list[Tensor] = []
        self._count = 0

    @classmethod
    def of(cls, n: int, mean: Tensor, scatter: Tensor) -> "Moments":
        """From the sums themselves: mean (dim,), scatter (dim, dim)."""
        made = cls(len(mean), mean.device)
        made._sums = _Sums(n, mean.double(), scatter.double())
        return made

    def state(self) -> dict[str, Tensor]:
        """All there is, for a file: `from_state` goes on with the same bits."""
        waiting = torch.cat(self._waiting) if self._waiting else self._sums.mean.new_zeros(0, self.dim)
        sums = {"mean": self._sums.mean, "scatter": self._sums.scatter} if self._sums.n else {}
        return {"n": torch.tensor(self._sums.n), "waiting": waiting, **sums}

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
        return torch.cat(self._waiting) if self._waiting and not self._sums.n else None

    @property
    def mean(self) -> Tensor:
        """(dim,)."""
        return self._total().mean

    @property
    def scatter(self) -> Tensor:
        """(dim, dim)."""
        return self._total().scatter

    def _total(self) -> _Sums:
        """The sums with the vectors that wait, which go on waiting."""
        if not self._waiting:
            return self._sums
        sums = self._sums.copy()
        sums.add_rows(torch.cat(self._waiting))
        return sums

    def update(self, features: Tensor) -> None:
        """Adds rows (k, dim). ValueError for another shape, or for numbers that are not finite: one would spoil all."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features {list(features.shape)}: (any, {self.dim}) is wanted")
        if not features.isfinite().all():
            raise ValueError("features that are not finite: the videos or the network that they came from are broken")
        rows = features.to(self._sums.mean, copy=True)  # the caller may write over his
        while len(rows):
            if self._count == self._slab:
                self._sum_up()
            part, rows = rows[: self._slab - self._count], rows[self._slab - self._count :]
            self._waiting.append(part)
            self._count += len(part)

    def merge(self, other: "Moments") -> None:
        """Adds all that another one has seen."""
        if other._sums.n:
            self._sum_up()
            self._sums.add(_Sums(other._sums.n, other._sums.mean.to(self._sums.mean), other._sums.scatter.to(self._sums.mean)))
        for rows in other._waiting:
            self.update(rows)

    def _sum_up(self) -> None:
        """The vectors that wait join the sums."""
        if self._waiting:
            self._sums.add_rows(torch.cat(self._waiting))
            self._waiting, self._count = [], 0

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
    few = [_few_rows(moments, unbiased) for moments in (first, second)]
    apart = (first.mean - second.mean.to(first.mean)).square().sum()
    if few[0] is not None and few[1] is not None:
        one, two = few[0], few[1].to(first.mean)
        cross = torch.linalg.svdvals(one @ two.T).sum()
        return float(apart + one.square().sum() + two.square().sum() - 2 * cross)
    if few[0] is None and few[1] is not None:
        first, second, few = second, first, few[::-1]
    other = second.covariance(unbiased=unbiased).to(first.mean)
    root, variance = _root(first, few[0], unbiased)
    product = root.T @ other @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float(apart + variance + other.trace() - 2 * cross)


def _few_rows(moments: Moments, unbiased: bool) -> Tensor | None:
    """Centred rows X of a set that has fewer of them than numbers, scaled: its covariance is X^T X. None for another set."""
    divisor = moments.divisor(unbiased=unbiased)
    rows = moments.rows
    return (rows - rows.mean(dim=0)) / divisor**0.5 if rows is not None and len(rows) < moments.dim else None


def _root(moments: Moments, few: Tensor | None, unbiased: bool) -> tuple[Tensor, Tensor]:
    """R with covariance R R^T, and its trace. A triangular one where the covariance has no zeros: eigenvectors take longer."""
    if few is not None:
        return few.T, few.square().sum()
    covariance = moments.covariance(unbiased=unbiased)
    root, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
    return root, covariance.trace()
