"""The stream of clips with what came before them.

Every frame says which sample and which frame it is (`tests.shard_sets.frames_of`), so a window tells where it was cut.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from tests import shard_sets
from tests.shard_sets import frames_in, sample_of, spoil, write_set
from tests.stream_cuts import Batches, draw_cut, equal, joined, replaced, take
from utils.errors import ConfigError

LENGTHS = (3, 4, 5, 6, 9)
MP4: dict[str, Any] = {"codec": "mp4", "size": (16, 16)}


def source(folder: Path, *, batch: int = 5, **more: Any) -> ClipSource:
    data = DataConfig(path=(str(folder),), **{"n_frames": 3, "previous": True, "num_workers": 0} | more)
    return ClipSource(open_shards(data), data, seed=3, global_batch_size=batch)


def cuts(batches: Batches, n_frames: int, interval: int = 1) -> list[tuple[int, int, bool]]:
    """(sample, first frame of the clip, has_previous) of each; an error where frames are not `interval` apart, or padding is not black."""
    found = []
    for batch in batches:
        for clip, flag in zip(batch["video"], batch["has_previous"].tolist(), strict=True):
            ((sample, frames),) = sample_of(clip[None] if flag else clip[None, :, n_frames:])
            assert frames == list(range(frames[0], frames[0] + len(frames) * interval, interval))
            assert len(frames) == n_frames * (1 + flag)
            assert flag or not clip[:, :n_frames].any()
            found.append((sample, frames[n_frames * flag], flag))
    return found


@pytest.mark.parametrize("interval", [1, 2])
def test_a_clip_comes_with_the_frames_before_it_where_there_are_any(tmp_path: Path, interval: int) -> None:
    lengths = LENGTHS if interval == 1 else (5, 6, 7, 11, 13)
    write_set(tmp_path / "set", [5], lengths=lengths)
    stream = source(tmp_path / "set", frame_interval=interval)
    found = cuts([batch for _, batch in zip(range(60), stream.batches(0), strict=False)], 3, interval)
    starts = {sample: {start for other, start, _ in found if other == sample} for sample in range(5)}
    if interval == 1:
        assert starts == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {3}, 4: {3, 4, 5, 6}}
    else:
        assert starts == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {6}, 4: {6, 7, 8}}
    assert {sample for sample, _, flag in found if flag} == {3, 4}


def test_of_mp4_too(tmp_path: Path) -> None:
    """Lossy, so the numbers in the frames are only about right."""
    write_set(tmp_path / "set", [5], lengths=(30, 40, 50, 60, 90), **MP4)
    for _, batch in zip(range(8), source(tmp_path / "set", n_frames=30).batches(0), strict=False):
        assert batch["video"].shape == (5, 3, 60, 16, 16) and int(batch["has_previous"].sum()) == 2
        for clip, flag in zip(batch["video"][:, 2].float().mean((2, 3)), batch["has_previous"].tolist(), strict=True):
            assert flag or not clip[:30].any()
            real = clip if flag else clip[30:]
            assert abs(real[-1] - real[0] - (len(real) - 1)) < 3


def test_black_frames_are_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is before a clip is told by the lengths, not by the pixels: a video may begin black."""
    monkeypatch.setattr(shard_sets, "frames_of", lambda number, count, size: np.zeros((count, *size, 3), dtype=np.uint8))
    write_set(tmp_path / "set", [4], lengths=(3, 6))
    batch = next(iter(source(tmp_path / "set", batch=4).batches(0)))
    assert not batch["video"].any() and int(batch["has_previous"].sum()) == 2


def test_pictures_are_mirrored_with_what_was_before_them(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [5], lengths=LENGTHS)
    stream = source(tmp_path / "set", flip=True)
    seen = set()
    for _, batch in zip(range(10), stream.batches(0), strict=False):
        for clip, flag in zip(batch["video"][:, 2].int(), batch["has_previous"].tolist(), strict=True):
            real = clip if flag else clip[3:]
            bright = (real[:, 0, 0] - real[:, 0, 1]).tolist()  # the left edge is bright
            assert len(set(map(bool, bright))) == 1
            seen.add(bool(bright[0]))
    assert seen == {True, False}


@pytest.mark.parametrize("first", [1, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [{}, MP4])
def test_a_stream_goes_on_at_any_step(tmp_path: Path, kind: dict[str, Any], workers: int, first: int) -> None:
    write_set(tmp_path / "set", [5, 4], lengths=LENGTHS, **kind)
    data = DataConfig(path=(str(tmp_path / "set"),), n_frames=3, previous=True, num_workers=workers)
    shards = open_shards(data)
    whole = take(shards, data, 0, 9, global_batch_size=4)
    assert equal(whole[first:], take(shards, data, first, 9 - first, global_batch_size=4))
    assert len({batch["index"][0].item() for batch in whole}) == 9


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_windows_and_flags_for_all_lengths_and_any_cut_into_processes(data: st.DataObject) -> None:
    n_frames, interval = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    alone, both = (n_frames - 1) * interval + 1, (2 * n_frames - 1) * interval + 1
    lengths = data.draw(st.lists(st.integers(alone, both + 6), min_size=2, max_size=7))
    first, steps = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3))
    cut = draw_cut(data, len(lengths))
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "set", [1, len(lengths) - 1], lengths=lengths)
        given_settings = {"path": (f"{folder}/set",), "n_frames": n_frames, "frame_interval": interval, "previous": True}
        shards = open_shards(DataConfig(path=(f"{folder}/set",)))
        found = joined(shards, given_settings, cut, first, steps)
        plain = DataConfig(num_workers=0, **given_settings)
        assert equal(found, take(shards, plain, first, steps, global_batch_size=cut.batch)), "one process gets the same"
    for sample, start, flag in cuts(found, n_frames, interval):
        assert flag == (lengths[sample] >= both), "as much before it as it is long, where that is there"
        assert start >= flag * n_frames * interval and start + (n_frames - 1) * interval < lengths[sample]


@pytest.mark.parametrize("kind", [{}, MP4])
def test_bad_samples_are_replaced_alike_by_all_processes(tmp_path: Path, kind: dict[str, Any]) -> None:
    """A clip with something before it may stand in for one without, and the other way round."""
    path = write_set(tmp_path / "set", [6, 6, 6], lengths=LENGTHS, **kind)
    spoil(path, 3, 5, 10)
    (path / "shard-00002.tar").write_bytes(b"")
    skip: dict[str, Any] = {"n_frames": 3, "previous": True, "on_bad_sample": "skip", "max_bad_share": 1.0}
    stream = source(path, batch=12, **skip)
    next(stream.batches(0))
    assert replaced(stream) > 0
    data = DataConfig(path=(str(path),), num_workers=0, **skip)
    batches = take(open_shards(data), data, 0, 6, global_batch_size=12)
    if not kind:
        samples = {sample for sample, _, _ in cuts(batches, 3)}
        assert not samples & {3, 5, 10} and samples <= set(range(12)) and len(samples) > 7
    parts = [take(open_shards(data), data, 0, 6, global_batch_size=12, rank=rank, world_size=2) for rank in (0, 1)]
    together = [{name: torch.cat([part[step][name] for part in parts]) for name in batches[0]} for step in range(6)]
    assert equal(batches, together)


def test_latents_of_frames_have_something_before_them_too(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [5], codec="framewise", lengths=LENGTHS)
    batch = next(iter(source(tmp_path / "set").batches(0)))
    assert batch["moments"].shape == (5, 4, 6, 1, 2)
    for latents, flag in zip(batch["moments"].float(), batch["has_previous"].tolist(), strict=True):
        ((_, frames),) = frames_in(latents[None] if flag else latents[None, :, 3:])
        assert frames == list(range(frames[0], frames[0] + 3 * (1 + flag))) and (flag or not latents[:, :3].any())


@pytest.mark.parametrize(
    ("kind", "given_settings", "told"),
    [
        ({}, {"clip_rule": "linspace"}, "--previous --clip-rule linspace"),
        ({}, {"images": 2}, "--previous --num-images 2"),
        ({}, {"frame_sample_prob": 0.5}, "--previous --frame-sample-prob 0.5"),
        ({}, {"n_frames": 4}, "--n-frames 4: its shortest video has 3 frames"),
        ({}, {"n_frames": 3, "frame_interval": 2}, "--n-frames 3 --frame-interval 2 (5 frames): its shortest video has 3 frames"),
        ({}, {"n_frames": 0}, "--previous: say --n-frames"),
        ({"codec": "latent"}, {"n_frames": 0}, "holds latents of whole clips, which say themselves what came before"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, kind: dict[str, Any], given_settings: dict[str, Any], told: str) -> None:
    write_set(tmp_path / "set", [5], lengths=LENGTHS, **kind)
    with pytest.raises(ConfigError) as caught:
        source(tmp_path / "set", **given_settings)
    assert told in str(caught.value) and "\n" not in str(caught.value)
