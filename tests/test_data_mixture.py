"""Several sets as one, in exact proportions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.order import Order, Shuffled
from datasets.proportions import MAX_PERIOD, Mixture, quotas
from datasets.shards import ShardSet
from tests.shard_sets import sample_of, write_set
from utils.errors import ConfigError


def mixture(sizes: list[int], weights: list[float], seed: int = 0) -> Mixture:
    return Mixture([Shuffled(n, seed=seed, stream=f"set/{k}") for k, n in enumerate(sizes)], weights, seed=seed)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1, 1), (1, 1)), ((0.7, 0.3), (7, 3)), ((2, 4, 6), (1, 2, 3)), ((0.1, 0.2, 0.7), (1, 2, 7)), ((50, 50.5), (100, 101))],
)
def test_weights_are_the_smallest_whole_numbers(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert quotas(weights) == expected


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_fine_weights_are_rounded_and_none_is_lost(weights: list[float]) -> None:
    found = quotas(weights)
    assert min(found) >= 1 and sum(found) <= MAX_PERIOD + len(weights)
    for weight, quota in zip(weights, found, strict=True):
        assert abs(quota / sum(found) - weight / sum(weights)) <= (len(weights) + 1) / MAX_PERIOD


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="--data-weights"):
        quotas((1.0, bad))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_period_has_the_exact_proportions_and_every_set_its_own_epochs(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 4))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    mix = mixture(sizes, weights, seed=data.draw(st.integers(0, 3)))
    period, start = sum(mix.quotas), data.draw(st.integers(0, 9000))
    sets, positions = mix.places(np.arange(start * period, (start + 4) * period))
    for part in sets.reshape(4, period):
        assert tuple(np.bincount(part, minlength=count)) == mix.quotas
    for number, quota in enumerate(mix.quotas):
        assert positions[sets == number].tolist() == list(range(start * quota, (start + 4) * quota))
    # A set's epoch is a permutation of it, wherever the others are.
    whole = mix.samples(np.arange(max(sizes) * period), 1)
    first = np.cumsum([0, *sizes])
    for number, n in enumerate(sizes):
        own = whole[(whole >= first[number]) & (whole < first[number + 1])] - first[number]
        assert sorted(own[:n]) == list(range(n))


def test_the_draw_of_a_period_does_not_depend_on_how_it_is_asked_for() -> None:
    mix = mixture([30, 70, 5], [0.5, 0.3, 0.2])
    whole = mix.samples(np.arange(9000), 8)
    again = mixture([30, 70, 5], [0.5, 0.3, 0.2])
    assert [int(again.samples(np.array([k]), 8)[0]) for k in range(8999, -1, -37)] == whole[8999::-37].tolist()
    assert len({tuple(mix.places(np.arange(k, k + 10))[0]) for k in range(0, 100, 10)}) > 3, "periods are drawn anew"


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_ranks_cut_a_mixture_as_they_cut_one_set(data: st.DataObject) -> None:
    world, micro = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.integers(1, 3))
    mix = mixture([40, 25], [3, 1])
    alone = Order(mix, global_batch=world * micro)
    step = data.draw(st.integers(0, 30))
    parts = [Order(mixture([40, 25], [3, 1]), global_batch=world * micro, rank=rank, world=world) for rank in range(world)]
    found = np.concatenate([part.samples(part.indices(step, 0)) for part in parts])
    assert found.tolist() == alone.samples(alone.indices(step, 0)).tolist()
    assert {part.steps_per_epoch for part in parts} == {65 // (world * micro)}


def test_sets_of_one_size_are_shuffled_each_in_its_own_way(tmp_path: Path) -> None:
    paths = [str(write_set(tmp_path / name, [30])) for name in "ab"]
    order = source(paths, weights=(1.0, 1.0)).order
    found = order.samples(np.arange(60))
    assert (found[found < 30]).tolist() != (found[found >= 30] - 30).tolist()


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    one = write_set(tmp_path / "one", [5, 2, 6], classes=("even", "odd"))
    two = write_set(tmp_path / "two", [9, 3], classes=("odd", "other"), first=100)
    return [str(one), str(two)]


def source(paths: list[str], **more: object) -> ClipSource:
    data = DataConfig(path=tuple(paths), num_workers=0, **more)  # type: ignore[arg-type]
    return ClipSource(open_shards(data), data, seed=1, global_batch_size=5)


def test_two_sets_are_one_with_merged_classes(pair: list[str]) -> None:
    shards = open_shards(DataConfig(path=tuple(pair)))
    assert (shards.num_samples, shards.classes, shards.name, shards.clip_length) == (25, ["even", "odd", "other"], "one+two", 3)
    assert shards.label[13:].tolist() == [1 + k % 2 for k in range(100, 112)]
    stream = source(pair)
    assert stream.steps_per_epoch == 5
    batches = stream.batches(0)
    found = []
    for _ in range(5):
        batch = next(batches)
        for (sample, frames), label in zip(sample_of(batch["video"]), batch["label"].tolist(), strict=True):
            assert frames == [0, 1, 2]
            assert shards.classes[label] == (("even", "odd") if sample < 100 else ("odd", "other"))[sample % 2]
            found.append(sample)
    assert sorted(found) == [*range(13), *range(100, 112)], "without weights an epoch has every sample of every set once"
    assert f"{pair[1]}/shard-0000" in shards.describe(13) and "clip_00100" in shards.describe(13)


def test_the_columns_of_two_sets_are_held_once(pair: list[str]) -> None:
    alone = [ShardSet.open(path) for path in pair]
    shards = Collection.of(*alone)
    for name in ("offset", "nbytes", "crc32", "frames", "sums"):
        whole = getattr(shards, name)
        assert np.array_equal(whole, np.concatenate([getattr(item, name) for item in alone]))
        for item, before in zip(shards.sets, alone, strict=True):
            own = getattr(item, name)
            assert np.shares_memory(own, whole) and np.array_equal(own, getattr(before, name))


def test_weights_reach_the_stream(pair: list[str]) -> None:
    batches = source(pair, weights=(4.0, 1.0)).batches(3)
    for _ in range(10):
        counts = Counter(sample >= 100 for sample, _ in sample_of(next(batches)["video"]))
        assert counts == {False: 4, True: 1}
    with pytest.raises(ConfigError, match=r"3 numbers for 2 shard sets"):
        source(pair, weights=(1.0, 1.0, 1.0))


def test_the_digest_names_all_sets(pair: list[str]) -> None:
    digests = {open_shards(DataConfig(path=tuple(paths))).digest for paths in (pair, pair[:1], pair[1:], pair[::-1])}
    assert len(digests) == 4


def test_raw_and_compressed_sets_mix(tmp_path: Path) -> None:
    paths = [str(write_set(tmp_path / codec, [6], codec=codec, size=(16, 16), first=40 * k)) for k, codec in enumerate(("npy", "mp4"))]
    batches = source(paths).batches(0)
    clips = [clip for _ in range(2) for clip in next(batches)["video"]]
    numbers = sorted(int(clip[1, 0, 0, 8]) for clip in clips if clip[1, 0, 0, 8] < 20)
    assert len(clips) == 10 and len(numbers) >= 4 and numbers == sorted(set(numbers))
    near = [round(float(clip[1, 0, :, 8:].float().mean())) for clip in clips if clip[1, 0, 0, 8] >= 20]
    assert all(abs(value - 43) < 12 for value in near) and near


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"size": (4, 4)}, "2 x 4 and 4 x 4"),
        ({"classes": ()}, "class labels"),
        ({"codec": "latent"}, "latents"),
    ],
)
def test_sets_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, other: dict[str, object], words: str) -> None:
    paths = [str(write_set(tmp_path / "a", [4])), str(write_set(tmp_path / "b", [4], **other))]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words) as caught:
        open_shards(DataConfig(path=tuple(paths)))
    assert "\n" not in str(caught.value)


def test_an_empty_set_is_refused_in_one_line(tmp_path: Path) -> None:
    paths = (str(write_set(tmp_path / "a", [4])), str(write_set(tmp_path / "b", [0])))
    for chosen in (paths, paths[1:]):
        with pytest.raises(ConfigError, match="/b holds no samples"):
            open_shards(DataConfig(path=chosen))


def test_sets_of_other_lengths_need_a_number_of_frames(tmp_path: Path) -> None:
    paths = tuple(str(write_set(tmp_path / str(k), [4], lengths=(k,))) for k in (3, 5))
    with pytest.raises(ConfigError, match="--n-frames"):
        resolve(DataConfig(path=paths), open_shards(DataConfig(path=paths)))
    assert resolve(DataConfig(path=paths, n_frames=2), open_shards(DataConfig(path=paths))).n_frames == 2
