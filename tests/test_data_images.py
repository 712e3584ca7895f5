"""Images beside clips: random frames of random samples, the same however the stream is cut, fetched, or damaged."""

import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from tasks.clips import ClipInfo, empty_batch
from tests.shard_sets import crc, sample_of, spoil, write_set
from tests.stream_cuts import Batches, draw_cut, equal, joined, replaced, take
from tests.test_data_remote import Store
from utils.errors import ConfigError, UserError


def images_of(batch: dict[str, torch.Tensor]) -> list[list[tuple[int, int]]]:
    """(sample, frame) of each image of each clip."""
    columns = [sample_of(batch["images"][:, :, slot : slot + 1]) for slot in range(batch["images"].shape[2])]
    return [[(sample, frame) for sample, (frame,) in row] for row in zip(*columns, strict=True)]


def source(path: Path | str, batch: int, **more: Any) -> ClipSource:
    data = DataConfig(path=(str(path),), **{"num_workers": 0} | more)
    return ClipSource(open_shards(data), data, seed=1, global_batch_size=batch)


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut_is_the_same_stream_and_the_clips_do_not_change(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda found: sum(found) > 0))
    cut = draw_cut(data, sum(sizes))
    with tempfile.TemporaryDirectory() as folder:
        path = write_set(Path(folder) / "set", sizes, lengths=(9, 6))
        spoil(path, *data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=sum(sizes) // 3, unique=True)))
        base: dict[str, Any] = {"path": (str(path),), "n_frames": 2, "flip": True, "on_bad_sample": "skip", "max_bad_share": 1.0}
        base |= {"shuffle": data.draw(st.sampled_from(["full", "block"])), "shuffle_shards": data.draw(st.integers(1, 3))}
        base |= {"clip_rule": data.draw(st.sampled_from(["consecutive", "linspace"]))}
        shards = open_shards(DataConfig(path=(str(path),)))
        steps = 2 * (sum(sizes) // cut.batch) + 1
        count, stop = data.draw(st.integers(1, 3)), data.draw(st.integers(0, steps - 1))
        alone = take(shards, DataConfig(num_workers=0, images=count, **base), 0, steps, global_batch_size=cut.batch)
        assert equal(joined(shards, base | {"images": count}, cut, stop, steps - stop), alone[stop:])
        plain = take(shards, DataConfig(num_workers=0, **base), 0, steps, global_batch_size=cut.batch)
    assert equal([{name: batch[name] for name in plain[0]} for batch in alone], plain)
    for batch in alone:
        labels = [[sample % 2 for sample, _ in row] for row in images_of(batch)]
        assert batch["image_label"].tolist() == labels


def test_every_frame_of_every_sample_comes_alike_and_no_slot_as_another(tmp_path: Path) -> None:
    stream = source(write_set(tmp_path / "set", [4, 4], lengths=(6, 3)), 8, images=4, n_frames=2)
    rows = [row for batch in islice(stream.batches(0), 60) for row in images_of(batch)]
    counts = Counter(pair for row in rows for pair in row)
    samples = Counter(sample for row in rows for sample, _ in row)
    assert counts.keys() == {(k, i) for k in range(8) for i in range((6, 3)[k % 2])}
    assert all(abs(count - 240) < 70 for count in samples.values()), samples
    assert all(abs(count - 240 / (6, 3)[pair[0] % 2]) < 45 for pair, count in counts.items()), counts
    assert sum(len(set(row)) < 4 for row in rows) < 120, "slots are drawn by themselves"


def test_images_flip_one_by_one(tmp_path: Path) -> None:
    stream = source(write_set(tmp_path / "set", [8]), 8, images=3, flip=True)
    bright = torch.cat([batch["images"][:, 0, :, 0] for batch in islice(stream.batches(0), 30)]).long()
    mirrored = bright[..., 0] < bright[..., -1]
    assert ((bright[..., 0] - bright[..., -1]).abs() == 50).all()
    assert 0.4 < mirrored.float().mean() < 0.6 and (mirrored[:, 0] != mirrored[:, 1]).any()
    plain = next(source(tmp_path / "set", 8, images=3).batches(0))["images"]
    assert (plain[:, 0, :, 0, 0] >= 50).all()


def test_images_of_compressed_clips_are_their_frames(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [6], codec="mp4", size=(16, 16), lengths=(5,))
    stream = source(path, 6, images=2)
    images = next(stream.batches(0))["images"]
    positions, slots = np.repeat(np.arange(6), 2), np.tile([0, 1], 6)
    samples, frames = stream.picker.images(positions, slots)
    whole = ClipReader(ShardSet.open(path), 5).read(samples, np.zeros(12, np.int64))[np.arange(12), frames]
    assert torch.equal(images, torch.from_numpy(whole).reshape(6, 2, 16, 16, 3).permute(0, 4, 1, 2, 3))


def test_a_batch_is_as_its_spec_says(tmp_path: Path) -> None:
    shards = open_shards(DataConfig(path=(str(write_set(tmp_path / "set", [5], lengths=(6,))),)))
    data = resolve(DataConfig(num_workers=0, images=3, n_frames=4), shards)
    batch, spec = take(shards, data, 0, 1, global_batch_size=4)[0], empty_batch(ClipInfo.of(shards, data), 4)
    assert batch["images"].shape == (4, 3, 3, 2, 4) and batch["images"].dtype == torch.uint8
    assert {name: (value.shape, value.dtype) for name, value in spec.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }


def test_sets_in_proportion_give_images_in_proportion(tmp_path: Path) -> None:
    paths = tuple(str(write_set(tmp_path / str(k), [6], first=100 * k)) for k in range(2))
    data = DataConfig(path=paths, weights=(3.0, 1.0), num_workers=0, images=2)
    for batch in islice(ClipSource(open_shards(data), data, seed=1, global_batch_size=8).batches(0), 6):
        assert sum(sample >= 100 for row in images_of(batch) for sample, _ in row) == 4


def test_images_of_blocks_come_from_the_window_of_their_clip(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [4] * 8)
    stream = source(path, 8, images=3, shuffle="block", shuffle_shards=2)
    windows = {frozenset(stream.shards.shard[stream.order.samples(np.arange(8 * k, 8 * k + 8))].tolist()) for k in range(4)}
    assert all(len(window) == 2 for window in windows)
    for batch in islice(stream.batches(0), 4):
        clips = {sample // 4 for sample, _ in sample_of(batch["video"])}
        found = {sample // 4 for row in images_of(batch) for sample, _ in row}
        assert found <= clips in windows
    everywhere = {sample // 4 for batch in islice(source(path, 8, images=3).batches(0), 4) for row in images_of(batch) for sample, _ in row}
    assert len(everywhere) == 8


KINDS: list[tuple[dict[str, Any], int]] = [({}, 0), ({}, 2), ({"codec": "framewise"}, 2), ({"codec": "mp4", "size": (16, 16)}, 1)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_images_of_a_remote_set_are_those_of_the_local_one_and_fetch_no_shard_twice(
    tmp_path: Path, kind: dict[str, Any], workers: int
) -> None:
    store = Store(tmp_path, **kind)

    def found(path: str, rank: int) -> list[int]:
        given = {"images": 2, "flip": kind.get("codec") != "framewise"}
        stream = store.source(path=(path,), shuffle="block", num_workers=workers, rank=rank, world_size=2, **given)
        batches = stream.batches(3)
        crcs = [crc(batch) for batch in islice(batches, 9)]
        batches.close()  # type: ignore[attr-defined]
        return crcs

    for rank in range(2):
        assert found(store.location, rank) == found(str(store.folder), rank)
    assert set(store.fetched().values()) == {1}


def test_shards_of_images_are_planned_with_those_of_clips(tmp_path: Path) -> None:
    """A rank whose clips lie in one shard reads images from the whole window."""
    store = Store(tmp_path)
    stream = store.source(batch=8, images=4, rank=0, world_size=8)
    seen: Batches = list(islice(stream.batches(0), 2))
    needed = set(stream.shards.shard[[s for batch in seen for row in images_of(batch) for s, _ in row]].tolist())
    assert len(needed) > 1
    ahead = stream._lookahead(0)
    try:
        assert needed <= set(np.concatenate([ahead._wanted(step) for step in range(2)]).tolist())
    finally:
        ahead.close()


def test_bad_images_are_named_or_replaced_and_counted(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [6, 6], lengths=(4,))
    spoil(path, 3, 8)  # in the last frame
    with pytest.raises(UserError, match=r"sample clip_0000[38] is damaged"):
        list(islice(source(path, 2, images=8, n_frames=1).batches(0), 40))
    stream = source(path, 12, images=4, on_bad_sample="skip", max_bad_share=1.0)
    batches = list(islice(stream.batches(0), 8))
    pairs = [pair for batch in batches for row in images_of(batch) for pair in row]
    assert not {(3, 3), (8, 3)} & set(pairs) and {(3, 0), (8, 0)} <= set(pairs), "other frames of the clip are good"
    assert replaced(stream) > 16, "more than the two clips a step"
    assert stream.faults is not None and stream.faults._seen == 8 * 12 * 5 + replaced(stream), "images count for the share of bad ones"
    again = islice(source(path, 12, images=4, on_bad_sample="skip", max_bad_share=1.0).batches(5), 2)
    assert [crc(batch) for batch in again] == [crc(batch) for batch in batches[5:7]]


def test_too_few_and_too_many_flags_are_refused_in_one_line(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [4]))
    with pytest.raises(ConfigError, match="--num-images -1") as caught:
        resolve(DataConfig(images=-1), shards)
    assert "\n" not in str(caught.value)
