"""datasets.order: the order of samples is one sequence, however it is cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.order import Order, Shuffled, block_permutation, permutation
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


def spread(data: st.DataObject) -> tuple[np.ndarray, int]:
    """(each sample's shard, window)"""
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda found: sum(found) > 0))
    return np.repeat(np.arange(len(sizes)), sizes), data.draw(st.integers(1, 4))


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_blocks_shuffle_whole_shards_window_by_window(data: st.DataObject) -> None:
    shard, window = spread(data)
    seed, epoch = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    order, bounds = block_permutation(seed, epoch, shard, window)
    assert sorted(order.tolist()) == list(range(len(shard)))
    parts = [set(shard[order[low:high]].tolist()) for low, high in pairwise(bounds)]
    assert all(1 <= len(part) <= window for part in parts) and sum(len(part) for part in parts) == len(np.unique(shard))
    assert set().union(*parts) == set(shard.tolist()), "no shard is in two windows"


def test_blocks_differ_by_epoch_and_seed_and_mix_their_shards() -> None:
    shard = np.repeat(np.arange(20), 30)
    orders = [block_permutation(seed, epoch, shard, 4)[0] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(len(set(shard[order[:60]].tolist())) == 4 for order in orders), "a window's samples are mixed"
    assert len({tuple(sorted(set(shard[order[:120]].tolist()))) for order in orders}) > 1, "windows hold other shards each time"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_batch_of_blocks_has_the_same_samples_sorted_by_shard(data: st.DataObject) -> None:
    shard, window = spread(data)
    n = len(shard)
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if w <= n]))
    batch = world * data.draw(st.integers(1, n // world))
    plain = Order(Shuffled(n, seed=1, shard=shard, window=window), global_batch=batch)
    parts = [
        Order(Shuffled(n, seed=1, shard=shard, window=window), global_batch=batch, rank=r, world=world, shard=shard) for r in range(world)
    ]
    for step in range(data.draw(st.integers(0, 5)), 8):
        whole = np.concatenate([part.samples(part.indices(step, 0)) for part in parts])
        assert sorted(whole) == sorted(plain.samples(plain.indices(step, 0)))
        assert (np.diff(shard[whole]) >= 0).all()
        assert np.concatenate([part.share(step) for part in parts]).tolist() == list(range(step * batch, (step + 1) * batch))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_substitute_is_drawn_by_position_and_comes_from_near(data: st.DataObject) -> None:
    shard, window = spread(data)
    n = len(shard)
    batch = data.draw(st.integers(1, n))
    sequence = Shuffled(n, seed=2, shard=shard, window=window)
    order = Order(sequence, global_batch=batch, shard=shard)
    index = data.draw(st.integers(0, 5 * batch - 1))
    (own,) = order.samples(np.array([index])).tolist()
    found = [order.substitute(index, attempt) for attempt in range(8)]
    assert found == [order.substitute(index, attempt) for attempt in range(8)]
    epoch = index // (n // batch * batch)
    permuted, bounds = sequence.epoch(epoch)
    place = permuted.tolist().index(own)
    number = int(np.searchsorted(bounds, place, side="right"))
    assert set(found) <= set(permuted[bounds[number - 1] : bounds[number]].tolist())
    far = {order.substitute(index, attempt) for attempt in range(16, 16 + 40 * n)}
    assert far == set(range(n)), "in the end any sample may take its place"
