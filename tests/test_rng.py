"""Addressed randomness: draws depend on seed, stream and index alone, and look random."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.rng import SampleRng, derive_seed, hash_indices

indices = st.lists(st.integers(0, 2**48), min_size=1, max_size=6, unique=True)
seeds = st.integers(0, 2**31)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, index=indices, data=st.data())
def test_a_sample_gets_its_draws_in_any_company(seed: int, index: list[int], data: st.DataObject) -> None:
    whole = SampleRng(seed, torch.tensor(index))
    order = data.draw(st.permutations(range(len(index))))
    part = order[: data.draw(st.integers(1, len(index)))]
    some = SampleRng(seed, torch.tensor(index)[list(part)])
    assert torch.equal(some.normal("noise", (2, 3)), whole.normal("noise", (2, 3))[list(part)])
    assert torch.equal(some.uniform("time"), whole.uniform("time")[list(part)])
    assert torch.equal(some.integers("step", 1000), whole.integers("step", 1000)[list(part)])


@settings(max_examples=50, deadline=None)
@given(seed=seeds, index=indices, high=st.integers(1, 2**40))
def test_ranges(seed: int, index: list[int], high: int) -> None:
    rng = SampleRng(seed, torch.tensor(index))
    assert ((rng.uniform("a") >= 0) & (rng.uniform("a") < 1)).all()
    assert ((rng.integers("a", high) >= 0) & (rng.integers("a", high) < high)).all()


def test_bounds_per_sample() -> None:
    high = torch.arange(1, 101)
    drawn = SampleRng(0, torch.arange(100)).integers("window", high)
    assert (drawn < high).all() and drawn[0] == 0


@settings(max_examples=30, deadline=None)
@given(seed=seeds, index=st.integers(0, 2**40))
def test_seeds_streams_and_indices_are_told_apart(seed: int, index: int) -> None:
    def draw(seed: int, stream: str, index: int) -> float:
        return float(SampleRng(seed, torch.tensor([index])).normal(stream, (1,)))

    values = {draw(seed, "a", index), draw(seed + 1, "a", index), draw(seed, "b", index), draw(seed, "a", index + 1)}
    assert len(values) == 4


def test_moments_and_independence_of_neighbours() -> None:
    rng = SampleRng(5, torch.arange(20_000))
    uniform = rng.uniform("u").double()
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.002
    assert abs(torch.corrcoef(torch.stack([uniform[:-1], uniform[1:]]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([uniform, rng.uniform("v").double()]))[0, 1]) < 0.03
    normal = SampleRng(5, torch.arange(500)).normal("n", (64,)).double()
    assert abs(normal.mean()) < 0.02 and abs(normal.var() - 1) < 0.03
    assert np.bincount(rng.integers("i", 7).numpy()).min() > 20_000 / 7 * 0.93


def test_no_collisions() -> None:
    assert len(np.unique(hash_indices(1, "x", np.arange(100_000)))) == 100_000


def test_values_do_not_change_between_versions() -> None:
    """A run that is resumed with a newer Kinoform must see the same numbers."""
    assert derive_seed(0, "weights") == 14776526817272718198
    assert SampleRng(0, torch.arange(3)).integers("timestep", 1000).tolist() == [474, 635, 160]


def test_meta_device_holds_no_numbers() -> None:
    rng = SampleRng(0, torch.arange(4), "meta")
    assert rng.normal("n", (2,)).is_meta and rng.uniform("u").is_meta and rng.integers("i", 3).is_meta
