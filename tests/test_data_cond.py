"""Condition vectors come beside the samples they were stored with, or the damage is named."""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.conditions import CondFormat
from datasets.config import DataConfig, open_shards, resolve
from datasets.handles import Handle, Handles
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from tasks.clips import ClipInfo, empty_batch
from tests.shard_sets import crc, frames_in, sample_of, vector_of, write_set
from tests.stream_cuts import draw_cut, equal, joined, replaced, take
from utils.errors import ConfigError, UserError

SMALL = CondFormat((2, 3), "float16")


def spoil_vectors(folder: Path, *samples: int) -> None:
    """Flips a byte at the end of the condition vectors of these samples."""
    shards = ShardSet.open(folder)
    assert shards.cond_offset is not None
    for sample in samples:
        path = shards.shard_path(sample)
        data = bytearray(path.read_bytes())
        data[int(shards.cond_offset[sample]) + shards.meta["cond_nbytes"] - 1] ^= 1
        path.write_bytes(data)


def check(vectors: torch.Tensor, numbers: list[int], cond: CondFormat) -> None:
    assert vectors.dtype == torch.float32 and vectors.shape == (len(numbers), cond.values)
    for vector, number in zip(vectors, numbers, strict=True):
        assert np.array_equal(vector.numpy(), vector_of(number, cond).reshape(-1).astype(np.float32))


@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut_has_the_vectors_of_its_samples(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(lambda found: sum(found) > 0))
    cut = draw_cut(data, sum(sizes))
    cond = CondFormat(data.draw(st.sampled_from([(5,), (2, 3), (1, 2, 2)])), data.draw(st.sampled_from(["float16", "float32"])))
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_set(Path(folder) / "set", sizes, lengths=(4,), cond=cond))
        base: dict[str, Any] = {"path": (path,), "n_frames": 2, "flip": True, "images": data.draw(st.integers(0, 2)), "shuffle_shards": 2}
        base |= {"shuffle": data.draw(st.sampled_from(["full", "block"]))}
        shards = open_shards(DataConfig(path=(path,)))
        alone = take(shards, DataConfig(num_workers=0, **base), 0, 3, global_batch_size=cut.batch)
        stop = data.draw(st.integers(0, 2))
        assert equal(joined(shards, base, cut, stop, 3 - stop), alone[stop:])
    for batch in alone:
        check(batch["cond"], [sample for sample, _ in sample_of(batch["video"])], cond)


@pytest.mark.parametrize("codec", ["npy", "framewise"])
def test_a_batch_is_as_its_spec_says(tmp_path: Path, codec: str) -> None:
    shards = open_shards(DataConfig(path=(str(write_set(tmp_path / "set", [5], codec=codec, cond=SMALL)),)))
    data = resolve(DataConfig(num_workers=0, images=2), shards)
    batch = take(shards, data, 0, 1, global_batch_size=4)[0]
    spec = empty_batch(ClipInfo.of(shards, data), 4)
    assert {name: (value.shape, value.dtype) for name, value in spec.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }
    if codec == "framewise":
        check(batch["cond"], [sample for sample, _ in frames_in(batch["moments"])], SMALL)


def test_sets_mix_where_their_vectors_are_of_one_kind(tmp_path: Path) -> None:
    paths = [write_set(tmp_path / str(k), [4, 2], first=10 * k, cond=SMALL) for k in range(2)]
    data = DataConfig(path=tuple(map(str, paths)), num_workers=0)
    (batch,) = take(open_shards(data), data, 0, 1, global_batch_size=12)
    numbers = [sample for sample, _ in sample_of(batch["video"])]
    assert sorted(numbers) == [*range(6), *range(10, 16)]
    check(batch["cond"], numbers, SMALL)
    for name, cond in (("none", None), ("other", CondFormat((6,), "float16"))):
        other = write_set(tmp_path / name, [4], cond=cond)
        with pytest.raises(ConfigError, match="condition vectors") as caught:
            open_shards(DataConfig(path=(str(paths[0]), str(other))))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_vector_is_named_or_passed_over(tmp_path: Path, workers: int) -> None:
    folder = write_set(tmp_path / "set", [6, 6], cond=SMALL)
    spoil_vectors(folder, 3, 8)
    data = DataConfig(path=(str(folder),), num_workers=workers)
    with pytest.raises(UserError, match=r"sample clip_0000[38] has a damaged condition vector") as caught:
        take(open_shards(data), data, 0, 1, global_batch_size=12)
    assert "\n" not in str(caught.value)
    skip = DataConfig(path=(str(folder),), num_workers=workers, on_bad_sample="skip", max_bad_share=1.0)
    source = ClipSource(open_shards(skip), skip, seed=1, global_batch_size=12)
    batches = list(islice(source.batches(0), 3))
    for batch in batches:
        numbers = [sample for sample, _ in sample_of(batch["video"])]
        assert not {3, 8} & set(numbers)
        check(batch["cond"], numbers, SMALL)
        assert batch["label"].tolist() == [number % 2 for number in numbers]
    assert replaced(source) >= 6
    again = islice(ClipSource(open_shards(skip), skip, seed=1, global_batch_size=12).batches(2), 1)
    assert [crc(batch) for batch in again] == [crc(batches[2])]


@pytest.mark.parametrize("codec", ["npy", "mp4"])
def test_a_file_stays_open_while_it_is_read(tmp_path: Path, codec: str) -> None:
    """Another thread may have filled the table of open shards by then, and this one left it."""

    class Crowded(Handles):
        def get(self, shard: int) -> Handle:
            return Handle(self._shards.open_shard(shard))

    size = (16, 16) if codec == "mp4" else (2, 4)
    shards = Collection.over(ShardSet.open(write_set(tmp_path / "set", [4], codec=codec, cond=SMALL, size=size)))
    reader, rows = ClipReader(shards, 2, handles=Crowded(shards)), np.arange(4)
    vectors = np.empty((4, SMALL.values), np.float32)
    assert reader.fill(reader.empty(4), rows, rows, np.zeros(4, np.int64)) == []
    assert reader.fill_vectors(vectors, rows, rows) == []
    check(torch.from_numpy(vectors), rows.tolist(), SMALL)


def test_a_shard_without_its_index_is_passed_over(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [4, 4, 4], cond=SMALL)
    (folder / "shard-00001.index.json").unlink()
    data = DataConfig(path=(str(folder),), num_workers=0, on_bad_sample="skip", max_bad_share=1.0)
    for batch in take(open_shards(data), data, 0, 3, global_batch_size=6):
        check(batch["cond"], [sample for sample, _ in sample_of(batch["video"])], SMALL)
