"""Frechet and kernel distances against plain references, and what resampling says of them."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metrics import frechet
from metrics.frechet import Moments, frechet_distance, update_halves
from metrics.kernel import kernel_distance, weighted_distances
from metrics.resampling import bootstrap_frechet, bootstrap_kernel, bootstrap_score, frechet_limit, interval


def moments_of(rows: Tensor) -> Moments:
    found = Moments(rows.shape[1])
    found.update(rows)
    return found


def features(count: int, dim: int, rank: int, seed: int, steep: float = 1.0, shift: float = 0.0) -> Tensor:
    """Rows in a space of `rank` dimensions whose variances fall as k^-steep."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, rank, generator=generator, dtype=torch.float64) * torch.arange(1, rank + 1) ** (-steep / 2)
    return latent @ torch.randn(rank, dim, generator=generator, dtype=torch.float64) + shift


def reference(first: Tensor, second: Tensor, *, unbiased: bool) -> float:
    """By the nuclear norm of A B^T, where A and B are all centred rows: nothing is squared, no root is taken."""
    centred = [(rows - rows.mean(0)) / math.sqrt(len(rows) - unbiased) for rows in (first, second)]
    # Left singular vectors of tall matrices do not change a nuclear norm of the small factors.
    factors = [torch.linalg.qr(rows).R if len(rows) > rows.shape[1] else rows for rows in centred]
    cross = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    return float(apart + sum(rows.square().sum() for rows in centred) - 2 * cross)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    dim=st.integers(1, 40),
    rank=st.integers(1, 40),
    steep=st.sampled_from([0.0, 1.0, 2.0]),
    shift=st.sampled_from([0.0, 1e3]),
    unbiased=st.booleans(),
)
@example(counts=(600, 50), dim=40, rank=40, steep=1.0, shift=0.0, unbiased=True)  # sums beside rows
@example(counts=(50, 600), dim=60, rank=9, steep=2.0, shift=1e3, unbiased=False)
@example(counts=(600, 700), dim=300, rank=20, steep=1.0, shift=0.0, unbiased=False)  # singular, and no rows
def test_the_distance_is_that_of_the_reference(
    counts: tuple[int, int], dim: int, rank: int, steep: float, shift: float, unbiased: bool
) -> None:
    """Full and deficient rank, fewer rows than numbers on one side or both; to 1e-6 of the distance."""
    first = features(counts[0], dim, min(rank, dim), 0, steep, shift)
    second = 1.3 * features(counts[1], dim, min(rank, dim), 1, steep) + shift + 0.2
    expected = reference(first, second, unbiased=unbiased)
    for one, two in ((first, second), (second, first)):
        found = frechet_distance(moments_of(one), moments_of(two), unbiased=unbiased)
        assert found == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(20, 120),
    dim=st.integers(2, 60),
    rank=st.integers(1, 60),
    steep=st.sampled_from([0.0, 1.0, 2.0]),
    noise=st.sampled_from([0.3, 0.03, 0.01]),
    as_sums=st.tuples(st.booleans(), st.booleans()),
)
@example(count=100, dim=60, rank=60, steep=2.0, noise=0.01, as_sums=(True, True))
@example(count=30, dim=60, rank=60, steep=0.0, noise=0.01, as_sums=(True, True))  # fewer rows than numbers, of which only sums are left
@example(count=120, dim=60, rank=10, steep=0.0, noise=0.01, as_sums=(True, False))
def test_the_distance_of_close_sets_is_exact(
    count: int, dim: int, rank: int, steep: float, noise: float, as_sums: tuple[bool, bool]
) -> None:
    """As those of good reconstructions are: to 1e-6 of the distance itself, thousands of times smaller than the variances."""
    first = features(count, dim, min(rank, dim), 0, steep)
    mixed = torch.randn(count, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / count**0.5
    second = first + noise * mixed @ first
    sides = [moments_of(rows) for rows in (first, second)]
    sides = [Moments.of(one.n, one.mean, one.scatter) if sums else one for one, sums in zip(sides, as_sums, strict=True)]
    assert frechet_distance(*sides) == pytest.approx(reference(first, second, unbiased=True), rel=1e-6)


def test_the_slower_way_is_left_to_close_and_singular_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many vectors again as numbers, as 2,048 clips and VideoMAE's 1,408 numbers are, with a wide spectrum."""
    first, second = (features(450, 300, 300, seed, steep=2.0, shift=0.1 * seed) for seed in (0, 1))
    expected = reference(first, second, unbiased=True)
    monkeypatch.setattr(frechet.linalg, "svdvals", lambda *_, **__: pytest.fail("singular values"))
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself() -> None:
    for count, dim, rank in ((500, 30, 30), (500, 30, 7), (20, 30, 30), (400, 300, 300)):
        rows = features(count, dim, rank, 3)
        spread = float(rows.var(0).sum())
        assert abs(frechet_distance(moments_of(rows), moments_of(rows.clone()))) < 1e-12 * spread


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_sums_are_the_same_to_the_last_bit_for_any_batches(sizes: list[int]) -> None:
    """Also through a file, and whoever looked at them in between."""
    rows = features(sum(sizes), 12, 12, 4, shift=5.0)
    whole, parts = moments_of(rows), Moments(12)
    for part in rows.split(sizes):
        parts.update(part)
        _ = parts.mean
        parts = Moments.from_state(parts.state())
    assert parts.n == whole.n == len(rows)
    if len(rows):
        assert torch.equal(parts.mean, whole.mean) and torch.equal(parts.scatter, whole.scatter)


@pytest.mark.parametrize("each", [1, 3])
def test_rows_of_a_video_go_to_its_half(each: int) -> None:
    rows = features(300 * each, 6, 6, 4)
    first = np.random.default_rng(0).random(300) < 0.4
    found = Moments(6), Moments(6)
    for start in range(0, 300, 32):
        update_halves(found, rows[each * start : each * (start + 32)], first[start : start + 32])
    own = torch.from_numpy(first).repeat_interleave(each)
    for half, expected in zip(found, (rows[own], rows[~own]), strict=True):
        assert half.n == len(expected) and torch.equal(half.scatter, moments_of(expected).scatter)
    both = Moments.union(found)
    assert both.n == len(rows)
    torch.testing.assert_close(both.scatter, moments_of(rows).scatter)
    with pytest.raises(ValueError, match="not finite"):
        update_halves(found, torch.full((2 * each, 6), math.nan), first[:2])


def test_an_updates_rows_may_be_written_over() -> None:
    rows, found = torch.ones(3, 2), Moments(2)
    found.update(rows)
    rows.zero_()
    assert found.mean.tolist() == [1, 1]


def test_sums_that_join_others_are_left_as_they_are() -> None:
    rows = features(2500, 6, 6, 5)
    one, whole = moments_of(rows), Moments(6)
    before = one.scatter.clone()
    whole.merge(one)
    whole.merge(one)
    assert whole.n == 5000 and torch.equal(one.scatter, before)
    torch.testing.assert_close(whole.scatter, 2 * before)


def test_one_number_that_is_not_finite_is_refused_and_large_ones_are_not() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        rows = torch.ones(4, 3)
        rows[2, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            moments_of(rows)
    assert moments_of(torch.full((4, 3), 3e38)).n == 4  # whose sum is beyond float32


# ---- kernel distance


def naive(first: Tensor, second: Tensor) -> float:
    def kernel(one: Tensor, two: Tensor) -> Tensor:
        return (one @ two.T / one.shape[1] + 1) ** 3

    n, m = len(first), len(second)
    own = [(kernel(rows, rows).sum() - kernel(rows, rows).diagonal().sum()) / (len(rows) * (len(rows) - 1)) for rows in (first, second)]
    return float(own[0] + own[1] - 2 * kernel(first, second).sum() / (n * m))


def test_the_kernel_distance_is_the_plain_one() -> None:
    first, second = features(40, 6, 6, 0), features(30, 6, 6, 1) + 0.5
    assert kernel_distance(first[:30], second, size=30) == (pytest.approx(naive(first[:30], second)), 0.0)
    again = [kernel_distance(first, second, subsets=400, size=10, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert again[0][0] == pytest.approx(naive(first, second), abs=4 * again[0][1] / 20) and again[0][1] > 0
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(first[:1], second)


def test_a_kernel_is_worked_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(40, 6, 6, 0), features(30, 6, 6, 1)
    weights = [torch.randint(0, 3, (5, count), generator=torch.Generator().manual_seed(count)).double() for count in (40, 30)]
    whole = weighted_distances(first, second, *weights)
    monkeypatch.setattr("metrics.kernel._CHUNK", 7)
    torch.testing.assert_close(weighted_distances(first, second, *weights), whole)


def test_copies_of_a_vector_are_no_pair() -> None:
    """The mean over resampled sets is the distance of the sets; pairs of a vector with its copies would add to it."""
    first, second = features(60, 6, 6, 0), features(60, 6, 6, 1)
    found = bootstrap_kernel(first, second, 400, 0)
    assert np.mean(found) == pytest.approx(naive(first, second), abs=4 * float(np.std(found)) / 20)


# ---- resampling


def test_an_interval_is_as_wide_as_the_figure_varies() -> None:
    """Distances of other sets of the size spread as those of resampled ones, which lie higher: the interval is about the figure."""
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def draw(seed: int, shift: float) -> Tensor:
        return torch.randn(200, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ mixing + shift

    draws = [frechet_distance(moments_of(draw(2 * k, 0)), moments_of(draw(2 * k + 1, 0.5))) for k in range(60)]
    real, generated = draw(1000, 0), draw(1001, 0.5)
    value = frechet_distance(moments_of(real), moments_of(generated))
    resampled = bootstrap_frechet(real[:, None], generated[:, None], 60, 0)
    assert 0.6 < np.std(resampled) / np.std(draws) < 1.7
    low, high = interval(value, resampled)
    assert low < value < high and np.mean(resampled) > value
    assert resampled == bootstrap_frechet(real[:, None], generated[:, None], 60, 0)


def test_an_interval_takes_the_spread_alone() -> None:
    assert interval(10.0, [30.0 + k for k in range(41)]) == pytest.approx((10 - 19, 10 + 19))


def test_vectors_of_a_video_are_drawn_together() -> None:
    """k equal vectors of each video give the distances of one."""
    real, generated = features(30, 4, 4, 0)[:, None], features(30, 4, 4, 1)[:, None] + 0.1
    one = bootstrap_frechet(real, generated, 5, 0, unbiased=False)
    assert bootstrap_frechet(real.repeat(1, 3, 1), generated.repeat(1, 3, 1), 5, 0, unbiased=False) == pytest.approx(one)


def test_the_limit_is_nearer_to_the_truth_than_the_distance() -> None:
    """Two normal distributions that are 1.5 apart in one number: 2.25."""
    generator = torch.Generator().manual_seed(0)
    deviation = (30 / torch.arange(1, 41).double()).sqrt()
    real, generated = (torch.randn(600, 40, generator=generator, dtype=torch.float64) * deviation for _ in range(2))
    generated[:, 0] += 1.5
    value = frechet_distance(moments_of(real), moments_of(generated))
    limit, by_size = frechet_limit(real[:, None], generated[:, None], 0)
    assert list(by_size) == [150, 225, 300, 450, 600] and by_size[600] == pytest.approx(value)
    assert all(small > large for small, large in pairwise(by_size.values()))
    assert abs(limit - 2.25) < 0.5 * abs(value - 2.25)
    with pytest.raises(ValueError, match=re.escape("7 videos: the limit needs at least 8")):
        frechet_limit(real[:7, None], generated[:, None], 0)


def test_scores_are_resampled_within_their_splits() -> None:
    probs = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double().softmax(dim=1)
    found = bootstrap_score(probs, 3, 20, 0)
    assert len(set(found)) == 20 and all(1 < score < 5 for score in found)
    certain = torch.eye(4).repeat_interleave(5, dim=0)  # each split of one class
    assert bootstrap_score(certain, 4, 5, 0) == [1.0] * 5
