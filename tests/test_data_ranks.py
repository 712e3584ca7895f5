"""The stream over random shard sizes, worlds, workers and stop points: one order, disjoint, complete, equal batches, exact resume."""

import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.config import DataConfig, open_shards, resolve
from datasets.frames import linspace, strided
from datasets.handles import MAX_FILES
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from tests.shard_sets import SIZE, frames_of, sample_of, spoil, write_set
from utils.errors import ConfigError

Batches = list[dict[str, torch.Tensor]]


def take(shards: Collection, data: DataConfig, first: int, steps: int, **cut: int) -> Batches:
    accumulation = cut.get("accumulation", 1)
    stream = ClipSource(shards, data, seed=5, **cut).batches(first)  # type: ignore[arg-type]
    found = list(islice(stream, steps * accumulation))
    stream.close()  # type: ignore[attr-defined]
    return found


def equal(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut_of_the_stream_is_the_same_stream(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda found: sum(found) > 0))
    n = sum(sizes)
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if w <= n]))
    accumulation = data.draw(st.sampled_from([k for k in (1, 2) if k * world <= n]))
    batch = world * accumulation * data.draw(st.integers(1, n // (world * accumulation)))
    shuffle = data.draw(st.sampled_from(["full", "block"]))
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_set(Path(folder) / "set", sizes, lengths=(4,)))
        base = {"path": (path,), "n_frames": 2, "flip": True, "shuffle": shuffle, "shuffle_shards": data.draw(st.integers(1, 3))}
        shards = open_shards(DataConfig(path=(path,)))
        steps = 2 * (n // batch) + 1
        alone = take(shards, DataConfig(num_workers=0, **base), 0, steps, global_batch_size=batch)
        # Another world, which goes on from a stop point of the first.
        stop = data.draw(st.integers(0, steps - 1))
        workers = DataConfig(num_workers=data.draw(st.sampled_from([0, 1, 4])), prefetch=data.draw(st.integers(0, 3)), **base)
        cut = {"global_batch_size": batch, "accumulation": accumulation, "world_size": world}
        parts = [take(shards, workers, stop, steps - stop, rank=rank, **cut) for rank in range(world)]
    assert {len(part) for part in parts} == {(steps - stop) * accumulation}, "as many batches on every rank"
    joined = [
        {
            name: torch.cat([parts[rank][k * accumulation + i][name] for rank in range(world) for i in range(accumulation)])
            for name in alone[0]
        }
        for k in range(steps - stop)
    ]
    assert equal(joined, alone[stop:])
    for epoch in range(2):
        seen = [sample for b in alone[epoch * (n // batch) : (epoch + 1) * (n // batch)] for sample, _ in sample_of(b["video"])]
        assert len(set(seen)) == len(seen) == n // batch * batch, "an epoch repeats nothing and drops less than a batch"


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut_of_a_damaged_mixture_is_the_same_stream(data: st.DataObject) -> None:
    worlds = st.sampled_from([1, 2, 4, 8])
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(data.draw(st.integers(1, 3))):
            sizes = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=4).filter(lambda found: sum(found) > 0))
            path = write_set(Path(folder) / str(number), [*sizes, 8], lengths=(4,), first=100 * number)
            spoil(path, *data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=sum(sizes) // 2, unique=True)))
            if data.draw(st.booleans()):
                (path / "shard-00000.tar").write_bytes(b"")
            paths.append(str(path))
        weights = tuple(data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in paths) if data.draw(st.booleans()) else ()
        base = {"n_frames": 2, "flip": True, "shuffle": data.draw(st.sampled_from(["full", "block"])), "shuffle_shards": 2}
        base |= {"path": tuple(paths), "weights": weights, "on_bad_sample": "skip", "max_bad_share": 1.0}
        shards = open_shards(DataConfig(**base))
        world, batch = data.draw(worlds), 8 * data.draw(st.integers(1, shards.num_samples // 8))
        alone = take(shards, DataConfig(num_workers=0, **base), 0, 4, global_batch_size=batch)
        stop, workers = data.draw(st.integers(0, 3)), DataConfig(num_workers=data.draw(st.sampled_from([0, 2])), **base)
        parts = [take(shards, workers, stop, 4 - stop, rank=rank, global_batch_size=batch, world_size=world) for rank in range(world)]
    joined = [{name: torch.cat([part[step][name] for part in parts]) for name in alone[0]} for step in range(4 - stop)]
    assert equal(joined, alone[stop:])


def test_a_rank_reads_few_shards_of_a_batch_of_blocks(tmp_path: Path) -> None:
    path = str(write_set(tmp_path / "set", [8] * 8))
    data = DataConfig(path=(path,), num_workers=0, shuffle="block", shuffle_shards=4)
    shards = open_shards(data)
    for rank in range(4):
        for batch in take(shards, data, 0, 2, global_batch_size=32, rank=rank, world_size=4):
            assert len({sample // 8 for sample, _ in sample_of(batch["video"])}) == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_processes_give_the_same_blocks(tmp_path: Path, workers: int) -> None:
    path = str(write_set(tmp_path / "set", [5, 4, 7, 2], codec="mp4", size=(16, 16), lengths=(4,)))
    base = {"path": (path,), "n_frames": 2, "flip": True, "shuffle": "block", "shuffle_shards": 2}
    shards = open_shards(DataConfig(path=(path,)))
    alone = take(shards, DataConfig(num_workers=0, **base), 0, 7, global_batch_size=6)
    assert equal(alone[2:], take(shards, DataConfig(num_workers=workers, **base), 2, 5, global_batch_size=6))


RULES = [("consecutive", 1), ("consecutive", 3), ("linspace", 3), ("linspace", 1)]


@pytest.mark.parametrize(("rule", "interval"), RULES)
def test_frames_of_a_window_follow_the_rule(tmp_path: Path, rule: str, interval: int) -> None:
    path = str(write_set(tmp_path / "set", [4, 3], lengths=(12, 15)))
    data = DataConfig(path=(path,), n_frames=4, frame_interval=interval, clip_rule=rule, num_workers=0)  # type: ignore[arg-type]
    starts: dict[int, set[int]] = {12: set(), 15: set()}
    for batch in take(open_shards(data), data, 0, 30, global_batch_size=7):
        for sample, frames in sample_of(batch["video"]):
            total = (12, 15)[sample % 2]
            first = frames[0]
            assert frames == (strided(first, 4, interval) if rule == "consecutive" else linspace(first, total, 4, interval))
            starts[total].add(first)
    for total, found in starts.items():
        last = total - 3 * interval - 1 if rule == "consecutive" else max(0, total - 4 * interval - 1)
        assert found == set(range(last + 1)), "every start that fits is drawn"


@pytest.mark.parametrize(("rule", "interval"), RULES)
def test_compressed_windows_follow_the_rule(tmp_path: Path, rule: str, interval: int) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [3], codec="mp4", size=(16, 16), lengths=(15,)))
    samples, starts = np.arange(3), np.array([0, 1, 2])
    whole = ClipReader(shards, 15).read(samples, np.zeros(3, np.int64))
    found = ClipReader(shards, 4, interval=interval, rule=rule).read(samples, starts)
    for clip, own, start in zip(found, whole, starts.tolist(), strict=True):
        assert (clip == own[strided(start, 4, interval) if rule == "consecutive" else linspace(start, 15, 4, interval)]).all()


def test_windows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [4], lengths=(12,)))
    with pytest.raises(ConfigError, match=r"--n-frames 5 --frame-interval 3 \(13 frames\): its clips have 12"):
        resolve(DataConfig(n_frames=5, frame_interval=3), shards)
    assert resolve(DataConfig(n_frames=5, frame_interval=3, clip_rule="linspace"), shards).n_frames == 5
    for wrong in ({"frame_interval": 0}, {"shuffle_shards": 0}, {"max_bad_share": 1.5}):
        with pytest.raises(ConfigError, match="--" + next(iter(wrong)).replace("_", "-")):
            resolve(DataConfig(**wrong), shards)


def test_few_files_are_open_however_many_shards_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.handles.MAX_FILES", 3)
    assert MAX_FILES <= 256
    shards = ShardSet.open(write_set(tmp_path / "set", [1] * 12))
    reader = ClipReader(shards, 3)
    fds = Path("/proc/self/fd")
    before = len(list(fds.iterdir()))
    for _ in range(2):
        found = reader.read(np.arange(12), np.zeros(12, np.int64))
        assert all((found[k] == frames_of(k, 3, SIZE)).all() for k in range(12))
        assert len(list(fds.iterdir())) <= before + 3
    del reader
    assert len(list(fds.iterdir())) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workers", [0, 1])
def test_latents_come_by_name_in_their_own_type(tmp_path: Path, dtype: torch.dtype, workers: int) -> None:
    path = str(write_set(tmp_path / "set", [5, 3], codec="latent", dtype=dtype))
    data = DataConfig(path=(path,), num_workers=workers)
    batch = take(open_shards(data), data, 0, 1, global_batch_size=8)[0]
    assert sorted(batch) == ["a", "b", "index", "label"] and batch["a"].dtype == batch["b"].dtype == dtype
    assert batch["a"].shape == (8, 2, 3) and batch["b"].shape == (8, 4)
    assert sorted(batch["a"][:, 0, 0].tolist()) == list(range(8))
    assert torch.equal(batch["a"][:, :1, 0].expand(-1, 4), batch["b"])
    assert torch.equal(batch["label"], batch["a"][:, 0, 0].long() % 2)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"flip": True}, "--flip"), ({"n_frames": 2}, "--n-frames 2"), ({"frame_interval": 2}, "interval 2")]
)
def test_latents_are_taken_as_they_are(tmp_path: Path, wrong: dict[str, object], words: str) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [4], codec="latent"))
    with pytest.raises(ConfigError, match=words):
        resolve(DataConfig(**wrong), shards)  # type: ignore[arg-type]
