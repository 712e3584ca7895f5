"""The stream of clips whose frames are at one of several distances, drawn sample by sample.

Every frame says which sample and which frame it is (`tests.shard_sets.frames_of`), so a window tells how it was cut.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from tests.shard_sets import sample_of, spoil, write_set
from tests.stream_cuts import Batches, equal
from utils.errors import ConfigError, UserError

STRIDES = (1, 2, 4)
LENGTHS = (3, 6, 9, 12, 24)


def source(folder: Path, *, strides: tuple[int, ...] = STRIDES, batch: int = 5, ranks: tuple[int, int] = (0, 1), **more: Any) -> ClipSource:
    data = DataConfig(path=(str(folder),), **{"n_frames": 3, "num_workers": 0} | more)
    return ClipSource(open_shards(data), data, seed=3, global_batch_size=batch, strides=strides, rank=ranks[0], world_size=ranks[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [3, 2], lengths=LENGTHS)


def take(stream: ClipSource, first: int, steps: int) -> Batches:
    batches = stream.batches(first)
    found = list(islice(batches, steps))
    batches.close()  # type: ignore[attr-defined]
    return found


def cuts(stream: ClipSource, steps: int) -> list[tuple[int, int, int]]:
    """(sample, first frame, distance) of each clip; an error where its frames are not as far apart as the batch says."""
    found = []
    for batch in take(stream, 0, steps):
        for (sample, frames), number in zip(sample_of(batch["video"]), batch["stride"].tolist(), strict=True):
            assert np.diff(frames).tolist() == [STRIDES[number]] * 2
            found.append((sample, frames[0], STRIDES[number]))
    return found


def test_each_sample_draws_a_distance_that_it_has_the_frames_for(folder: Path) -> None:
    found = cuts(source(folder), 500)
    for sample, length in enumerate(LENGTHS):
        mine = [(start, stride) for other, start, stride in found if other == sample]
        usable = [stride for stride in STRIDES if 2 * stride < length]
        assert {stride for _, stride in mine} == set(usable)
        for stride in usable:
            starts = [start for start, other in mine if other == stride]
            assert set(starts) == set(range(length - 2 * stride)), "any window of it"
            assert len(starts) / len(mine) == pytest.approx(1 / len(usable), abs=0.15), "as often as the others"


def test_of_clips_with_what_was_before_them(folder: Path) -> None:
    """A distance at which nothing is before the clip is not drawn where there is another."""
    seen = set()
    for batch in take(source(folder, previous=True), 0, 100):
        rows = zip(batch["video"], batch["stride"].tolist(), batch["has_previous"].tolist(), strict=True)
        for clip, number, flag in rows:
            ((sample, frames),) = sample_of(clip[None] if flag else clip[None, :, 3:])
            assert set(np.diff(frames).tolist()) == {STRIDES[number]} and (flag or not clip[:, :3].any())
            seen.add((sample, STRIDES[number], flag))
    expected = {(sample, stride, True) for sample, length in enumerate(LENGTHS) for stride in STRIDES if 5 * stride < length}
    assert seen == expected | {(0, 1, False)}


def test_the_stream_is_a_function_of_the_position(folder: Path) -> None:
    whole = take(source(folder, batch=4), 0, 6)
    assert equal(take(source(folder, batch=4), 3, 3), whole[3:]), "from any step"
    assert equal(take(source(folder, batch=4, num_workers=2), 0, 6), whole), "whoever reads"
    for rank in (0, 1):
        for mine, both in zip(take(source(folder, batch=4, ranks=(rank, 2)), 0, 6), whole, strict=True):
            for name, value in mine.items():
                assert torch.equal(value, both[name][2 * rank : 2 * rank + 2])


def test_a_bad_sample_is_told_or_replaced(folder: Path) -> None:
    spoil(folder, 4)
    with pytest.raises(UserError, match="is damaged"):
        take(source(folder), 0, 30)
    found = cuts(source(folder, on_bad_sample="skip", max_bad_share=1.0), 30)
    assert len(found) == 150


@pytest.mark.parametrize(
    ("strides", "more", "message"),
    [
        ((1, 12), {}, "3 frames 12 apart take 25, the longest clip of .* has 24"),
        ((2, 4), {}, "3 frames 2 apart take 5, the shortest clip of .* has 3"),
        ((1, 2), {"frame_interval": 2, "n_frames": 2}, "neither --frame-interval"),
        ((1, 2), {"clip_rule": "linspace"}, "nor --clip-rule"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder: Path, strides: tuple[int, ...], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--frame-strides \d+ \d+: .*{message}") as error:
        source(folder, strides=strides, **more)
    assert "\n" not in str(error.value)


def test_latents_have_their_frames_already(tmp_path: Path) -> None:
    write_set(tmp_path / "latents", [5], codec="latent", lengths=(1,))
    with pytest.raises(ConfigError, match="holds latents of chosen frames"):
        source(tmp_path / "latents", n_frames=0)


def test_one_distance_is_that_distance(folder: Path) -> None:
    plain = [sample_of(batch["video"]) for batch in take(source(folder, strides=()), 0, 10)]
    assert [sample_of(batch["video"]) for batch in take(source(folder, strides=(1,)), 0, 10)] == plain
