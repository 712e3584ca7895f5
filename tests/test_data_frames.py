"""Single frames as samples: each kept frame once an epoch, however the stream is cut, stopped, fetched or damaged."""

import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from datasets.single_frames import SingleFrames
from launch.env import Env
from tasks.clips import _open as open_clips_of
from tests import distributed
from tests.shard_sets import crc, sample_of, spoil, write_set
from tests.stream_cuts import draw_cut, equal, joined, replaced, take
from tests.test_data_remote import Store
from utils.errors import ConfigError, UserError


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), share=st.floats(0.01, 1), seed=st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_a_frame_is_kept_by_its_own_draw(lengths: list[int], share: float, seed: int) -> None:
    kept = SingleFrames.draw(np.array(lengths), share, seed)
    found = pairs(kept)
    assert len(found) == len(kept) and (np.diff(kept.sample) >= 0).all()
    assert all(frame < lengths[sample] for sample, frame in found)
    longer = SingleFrames.draw(np.array([*(n + 3 for n in lengths), 7]), share, seed)
    assert found == {(s, f) for s, f in pairs(longer) if s < len(lengths) and f < lengths[s]}, "whatever else the set holds"
    assert found <= pairs(SingleFrames.draw(np.array(lengths), min(1, share * 1.5), seed)), "a larger share keeps these too"


def pairs(kept: SingleFrames) -> set[tuple[int, int]]:
    return set(zip(kept.sample.tolist(), kept.frame.tolist(), strict=True))


def test_the_share_is_met_and_the_pieces_of_a_large_set_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.full(2000, 50)
    kept = SingleFrames.draw(lengths, 0.1, 0)
    assert abs(len(kept) - 10_000) < 300 and kept.sample.dtype == kept.frame.dtype == np.int32
    assert len(SingleFrames.draw(lengths, 1.0, 0)) == 100_000
    monkeypatch.setattr("datasets.single_frames._CHUNK", 333)
    again = SingleFrames.draw(lengths, 0.1, 0)
    assert np.array_equal(kept.sample, again.sample) and np.array_equal(kept.frame, again.frame)
    assert not np.array_equal(SingleFrames.draw(lengths, 0.1, 1).frame[:1000], kept.frame[:1000])


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut_is_the_same_stream_and_an_epoch_has_each_kept_frame_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda found: sum(found) > 2))
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_set(Path(folder) / "set", sizes, lengths=(4, 7, 2)))
        base: dict[str, Any] = {"path": (path,), "frame_sample_prob": data.draw(st.sampled_from([0.5, 0.9, 1.0])), "flip": True}
        base |= {"shuffle": data.draw(st.sampled_from(["full", "block"])), "shuffle_shards": data.draw(st.integers(1, 3))}
        shards = open_shards(DataConfig(path=(path,)))
        kept = SingleFrames.draw(shards.frames, base["frame_sample_prob"], 5)
        assume(len(kept))
        cut = draw_cut(data, len(kept))
        steps = 2 * (len(kept) // cut.batch)
        alone = take(shards, DataConfig(num_workers=0, **base), 0, steps, global_batch_size=cut.batch)
        stop = data.draw(st.integers(0, steps - 1))
        assert equal(joined(shards, base, cut, stop, steps - stop), alone[stop:])
    assert alone[0]["video"].shape == (cut.batch, 3, 1, 2, 4)
    for epoch in range(2):
        part = alone[epoch * steps // 2 : (epoch + 1) * steps // 2]
        seen = [(sample, frame) for batch in part for sample, (frame,) in sample_of(batch["video"])]
        assert len(set(seen)) == len(seen) == len(kept) // cut.batch * cut.batch and set(seen) <= pairs(kept)


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_sets_mix_by_their_kept_frames_and_damage_is_passed_over(tmp_path: Path, weights: tuple[float, ...]) -> None:
    paths = [write_set(tmp_path / str(k), [4, 5], lengths=(6,), first=100 * k) for k in range(2)]
    spoil(paths[0], 2, 7)
    data = DataConfig(
        path=tuple(map(str, paths)), weights=weights, frame_sample_prob=0.6, num_workers=0, on_bad_sample="skip", max_bad_share=1
    )
    shards = open_shards(data)
    source = ClipSource(shards, data, seed=1, global_batch_size=8)
    batches = list(islice(source.batches(0), 4 * source.steps_per_epoch))
    seen = [sample for batch in batches for sample, _ in sample_of(batch["video"])]
    if weights:
        assert sum(sample < 100 for sample in seen) == len(seen) * 3 // 4
    kept = pairs(SingleFrames.draw(shards.frames, 0.6, 1))
    found = {(sample % 100 + 9 * (sample // 100), frame) for batch in batches for sample, (frame,) in sample_of(batch["video"])}
    assert found <= kept
    assert replaced(source) > 0
    again = ClipSource(shards, data, seed=1, global_batch_size=8).batches(5)
    assert [crc(batch) for batch in islice(again, 3)] == [crc(batch) for batch in batches[5:8]]


def test_blocks_keep_a_batch_within_few_shards(tmp_path: Path) -> None:
    path = str(write_set(tmp_path / "set", [4] * 8, lengths=(8,)))
    data = DataConfig(path=(path,), num_workers=0, frame_sample_prob=0.5, shuffle="block", shuffle_shards=2)
    shards = open_shards(data)
    source = ClipSource(shards, data, seed=0, global_batch_size=8)
    for batch in islice(source.batches(0), source.steps_per_epoch):
        assert len({sample // 4 for sample, _ in sample_of(batch["video"])}) <= 4
    assert "frame" in source.describe(3) and "clip_" in source.describe(3)


def test_compressed_frames_are_single_too(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [6], codec="mp4", size=(16, 16), lengths=(5,)))
    source = ClipSource(shards, DataConfig(frame_sample_prob=0.5, num_workers=0), seed=0, global_batch_size=6)
    video = next(source.batches(0))["video"]
    samples, frames = source.picker.clips(np.arange(6))
    assert video.shape == (6, 3, 1, 16, 16)
    whole = ClipReader(shards, 5).read(samples, np.zeros(6, np.int64))
    assert torch.equal(video[:, :, 0], torch.from_numpy(whole[np.arange(6), frames]).permute(0, 3, 1, 2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", [{}, {"codec": "mp4", "size": (16, 16)}])
def test_frames_of_a_remote_set_are_those_of_the_local_one(tmp_path: Path, kind: dict[str, Any]) -> None:
    store = Store(tmp_path, **kind)
    given: dict[str, Any] = {"frame_sample_prob": 0.5, "n_frames": 1}
    for rank in range(2):
        local = store.source(path=(str(store.folder),), shuffle="block", rank=rank, world_size=2, **given)
        stream = store.source(rank=rank, world_size=2, num_workers=1, **given).batches(3)
        found = [crc(batch) for batch in islice(stream, local.steps_per_epoch)]
        stream.close()  # type: ignore[attr-defined]
        assert found == [crc(batch) for batch in islice(local.batches(3), local.steps_per_epoch)]
    assert set(store.fetched().values()) == {1}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_frames": 4}, "--n-frames 4"),
        ({"frame_sample_prob": 1.5}, "probability"),
        ({"frame_sample_prob": -0.5}, "probability"),
        ({"images": 2}, "--num-images 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, wrong: dict[str, object], words: str) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [4]))
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(DataConfig(**{"frame_sample_prob": 0.5} | wrong), shards)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert resolve(DataConfig(frame_sample_prob=0.5, n_frames=0), shards).n_frames == 1


def test_a_share_that_keeps_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [2]))
    with pytest.raises(ConfigError, match=r"keeps no frame of .*\(6 frames\)"):
        ClipSource(shards, DataConfig(frame_sample_prob=1e-9), seed=0, global_batch_size=1)


def test_latents_of_whole_clips_have_no_frames(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set", [2], codec="latent"))
    for wrong in (DataConfig(frame_sample_prob=0.5), DataConfig(images=2)):
        with pytest.raises(ConfigError, match="latents of whole clips"):
            resolve(wrong, shards)


def open_own(env: Env, paths: list[str]) -> str:
    data = DataConfig(path=(paths[env.rank],), frame_sample_prob=0.5, on_bad_sample="skip", max_bad_share=1.0)
    try:
        return open_clips_of(data, env).name
    except UserError as error:
        return str(error)


def test_ranks_that_would_keep_other_frames_are_told_so(tmp_path: Path) -> None:
    whole = write_set(tmp_path / "set", [2, 2], lengths=(5, 9))
    cut = Path(shutil.copytree(whole, tmp_path / "copy" / "set"))
    (cut / "shard-00001.index.json").unlink()
    assert distributed.run(open_own, 2, paths=[str(whole), str(whole)]) == ["set", "set"]
    for message in distributed.run(open_own, 2, paths=[str(whole), str(cut)]):
        assert "not the same for all processes (clips of other lengths)" in message and "\n" not in message
