"""datasets.order: the order of samples is one sequence, however it is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.order import Order, Shuffled, permutation
from utils.errors import ConfigError


@given(n=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(seed, epoch, n)) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(permutation(seed, epoch, 100)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4 and tuple(range(100)) not in orders


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert permutation(0, 0, 8).tolist() == [2, 4, 5, 6, 3, 7, 1, 0]


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_ranks_and_micro_batches_cut_one_sequence(data: st.DataObject) -> None:
    world, accumulation, micro = (data.draw(st.integers(1, 4)) for _ in range(3))
    batch = world * accumulation * micro
    n = data.draw(st.integers(batch, 5 * batch + 7))
    seed, first = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 12))
    alone = Order(Shuffled(n, seed=seed), global_batch=batch)
    for step in range(first, first + 3):
        whole = alone.samples(alone.indices(step, 0))
        parts = []
        for rank in range(world):
            order = Order(Shuffled(n, seed=seed), global_batch=batch, accumulation=accumulation, rank=rank, world=world)
            parts += [order.samples(order.indices(step, k)) for k in range(accumulation)]
        assert np.concatenate(parts).tolist() == whole.tolist()


@given(n=st.integers(1, 60), data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_epoch_of_batches_repeats_nothing_and_drops_less_than_a_batch(n: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, n))
    order = Order(Shuffled(n, seed=1), global_batch=batch)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = np.concatenate([order.samples(order.indices(step, 0)) for step in steps])
        assert len(set(seen.tolist())) == len(seen) > n - batch


@pytest.mark.parametrize(
    ("n", "batch", "parts", "words"),
    [(100, 10, 4, "8 or 12"), (100, 3, 4, "use 4"), (100, 0, 4, "use 4"), (10, 12, 4, "at most 8"), (3, 4, 4, "too few")],
)
def test_a_batch_that_does_not_fit_names_the_nearest_that_does(n: int, batch: int, parts: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Order(Shuffled(n, seed=0), global_batch=batch, world=parts)
