"""The streams of single frames out of windows: first frames, and triples of the first, the previous and the current frame.

Every frame says which sample and which frame it is (`tests.shard_sets.frames_of`), so a triple tells how it was cut.
"""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import reader as reading
from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from datasets.reader import ClipReader
from datasets.triples import FirstReader, Take, TripleReader
from tasks.clips import ClipInfo, empty_batch
from tests.shard_sets import sample_of, spoil, write_set
from tests.stream_cuts import Batches, equal
from utils.errors import ConfigError, UserError

N = 4
LENGTHS = (4, 7, 9, 16)


def source(folder: Path, kind: Take = "triple", *, batch: int = 4, ranks: tuple[int, int] = (0, 1), **more: Any) -> ClipSource:
    data = DataConfig(path=(str(folder),), **{"n_frames": N, "num_workers": 0} | more)
    return ClipSource(open_shards(data), data, seed=3, global_batch_size=batch, take=kind, rank=ranks[0], world_size=ranks[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [3, 1], lengths=LENGTHS)


def read(stream: ClipSource, first: int, steps: int) -> Batches:
    batches = stream.batches(first)
    found = list(islice(batches, steps))
    batches.close()  # type: ignore[attr-defined]
    return found


def triples(stream: ClipSource, steps: int) -> list[tuple[int, int, int]]:
    """(sample, first frame, r) of each triple; an error where its frames are not those that r says."""
    found = []
    distance = stream.data.frame_interval
    for batch in read(stream, 0, steps):
        assert batch["video"].shape[2] == 3
        for (sample, (first, previous, current)), r in zip(sample_of(batch["video"]), batch["frame"].tolist(), strict=True):
            assert (previous - first, current - first) == ((r - 1) * distance, r * distance)
            found.append((sample, first, r))
    return found


def starts(length: int) -> list[int]:
    """Of windows that do not overlap."""
    return list(range(0, length - N + 1, N))


def test_every_triple_of_every_window_is_drawn_equally_often(folder: Path) -> None:
    """The release leaves out the last frame of a window, and never sees what follows the frame before it."""
    found = triples(source(folder), 1000)
    for sample, length in enumerate(LENGTHS):
        mine = [(first, r) for other, first, r in found if other == sample]
        expected = {(first, r) for first in starts(length) for r in range(1, N)}
        assert set(mine) == expected
        counts = np.array([mine.count(one) for one in sorted(expected)])
        assert counts.sum() == 1000 and abs(counts / 1000 - 1 / len(expected)).max() < 0.05


def test_windows_that_may_begin_at_every_other_frame(folder: Path) -> None:
    found = triples(source(folder, window_step=2), 600)
    firsts = {(sample, first) for sample, first, _ in found}
    assert firsts == {(sample, first) for sample, length in enumerate(LENGTHS) for first in range(0, length - N + 1, 2)}


def test_interleaved_windows(tmp_path: Path) -> None:
    """Blocks of four times four frames hold four windows of frames four apart; what is left at the end is dropped."""
    folder = write_set(tmp_path / "set", [4], lengths=(16, 35, 14, 13))
    found = triples(source(folder, frame_interval=4), 800)
    firsts = {sample: {first for other, first, _ in found if other == sample} for sample in range(4)}
    # Too short for a block, but long enough for a window: all of its windows.
    assert firsts == {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3, 16, 17, 18, 19}, 2: {0, 1}, 3: {0}}
    assert {r for _, _, r in found} == {1, 2, 3}


def test_first_frames_are_those_of_the_windows(folder: Path) -> None:
    found = set()
    for batch in read(source(folder, "first"), 0, 300):
        assert batch["video"].shape[2] == 1 and "frame" not in batch
        found |= {(sample, frame) for sample, (frame,) in sample_of(batch["video"])}
    assert found == {(sample, first) for sample, length in enumerate(LENGTHS) for first in starts(length)}


def test_validation_clips_and_other_samples_never_leak(tmp_path: Path) -> None:
    """Frames of a triple are of one sample (sample_of fails otherwise), and those of a set are of its own samples."""
    folders = [write_set(tmp_path / name, [2, 2], lengths=LENGTHS, first=first) for name, first in (("train", 0), ("val", 100))]
    for folder, own in zip(folders, (range(4), range(100, 104)), strict=True):
        assert {sample for sample, _, _ in triples(source(folder), 200)} == set(own)
        seen = {sample for batch in read(source(folder, "first"), 0, 50) for sample, _ in sample_of(batch["video"])}
        assert seen == set(own)


def test_all_frames_of_a_triple_are_mirrored_together(folder: Path) -> None:
    mirrored = []
    for batch in read(source(folder, flip=True), 0, 60):
        bright = (batch["video"][:, 0, :, 0, 0] > batch["video"][:, 0, :, 0, -1]).tolist()
        assert all(len(set(sample)) == 1 for sample in bright)
        mirrored += [not sample[0] for sample in bright]
    assert 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize("kind", ["first", "triple"])
def test_tasks_know_what_a_batch_holds(folder: Path, kind: Take) -> None:
    stream = source(folder, kind)
    (batch,) = read(stream, 0, 1)
    clips = ClipInfo.of(stream.shards, stream.data, take=kind)
    assert clips.n_frames == N, "of the window"
    expected = empty_batch(clips, 4)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }


@pytest.mark.parametrize("kind", ["first", "triple"])
def test_the_stream_is_a_function_of_the_position(folder: Path, kind: Take) -> None:
    whole = read(source(folder, kind), 0, 6)
    assert equal(read(source(folder, kind), 3, 3), whole[3:]), "from any step"
    assert equal(read(source(folder, kind, num_workers=2), 0, 6), whole), "whoever reads"
    for rank in (0, 1):
        for mine, both in zip(read(source(folder, kind, ranks=(rank, 2)), 0, 6), whole, strict=True):
            for name, value in mine.items():
                assert torch.equal(value, both[name][2 * rank : 2 * rank + 2])


def test_of_uncompressed_clips_three_frames_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, asked = source(folder), []
    plain = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        asked.append(sum(len(buffer) for buffer in buffers))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(reading.os, "preadv", counted)
    read(stream, 0, 5)
    assert sum(asked) == 5 * 4 * 3 * stream.reader.row_bytes


def test_of_compressed_clips_what_lies_between_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(DataConfig(path=(str(write_set(tmp_path / "set", [2], codec="mp4", lengths=(30,))),)))
    plain, asked = reading.decode_window, list[tuple[int, int]]()

    def noted(payload: bytes, start: int, n_frames: int, size: tuple[int, int] | None = None) -> np.ndarray:
        asked.append((start, n_frames))
        return plain(payload, start, n_frames, size)

    monkeypatch.setattr(reading, "decode_window", noted)
    TripleReader(shards, 30).read(np.array([1]), np.array([24]))
    assert asked == [(0, 1), (24, 2)]


@pytest.mark.parametrize("lengths", [LENGTHS, (12,)])
def test_compressed_clips_give_the_frames_that_decoding_the_whole_gives(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    shards = open_shards(DataConfig(path=(str(write_set(tmp_path / "set", [4], codec="mp4", lengths=lengths, size=(17, 32))),)))
    readers = {"triple": TripleReader(shards, N), "first": FirstReader(shards, N)}
    for sample in range(4):
        length = lengths[sample % len(lengths)]
        whole = ClipReader(shards, length).read(np.array([sample]), np.array([0]))[0]
        for number in range(len(starts(length)) * (N - 1)):
            one = np.array([sample]), np.array([number])
            first, r = number // (N - 1) * N, number % (N - 1) + 1
            assert readers["triple"].beside(*one)["frame"].tolist() == [r]
            np.testing.assert_array_equal(readers["triple"].read(*one)[0], whole[[first, first + r - 1, first + r]])
        for number, first in enumerate(starts(length)):
            np.testing.assert_array_equal(readers["first"].read(np.array([sample]), np.array([number]))[0], whole[[first]])


def test_a_bad_sample_is_told_or_replaced(folder: Path) -> None:
    spoil(folder, 3)
    with pytest.raises(UserError, match="is damaged"):
        read(source(folder), 0, 30)
    assert len(triples(source(folder, on_bad_sample="skip", max_bad_share=1.0), 30)) == 120


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("triple", {"n_frames": 1}, "--n-frames 1: .* of 2 frames or more"),
        ("triple", {"n_frames": 5}, "--n-frames 5: its shortest video has 4 frames"),
        ("triple", {"n_frames": 0}, "say --n-frames"),
        ("first", {"clip_rule": "linspace"}, "--clip-rule linspace: .* first frames of clips"),
        ("triple", {"n_frames": 1, "frame_sample_prob": 0.5}, "--frame-sample-prob: "),
        ("triple", {"images": 2}, "--num-images: "),
        ("triple", {"previous": True}, "--previous: "),
        ("window", {"window_step": 1}, "--window-step 1: .* drop the flag"),
        ("triple", {"window_step": -1}, "data.window_step -1 is negative"),
    ],
)
def test_settings_that_cannot_be(folder: Path, kind: Take, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        source(folder, kind, **more)
    assert "\n" not in str(error.value)


def test_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds latents"):
        source(write_set(tmp_path / "set", [2], codec="latent"), n_frames=0, batch=2)
