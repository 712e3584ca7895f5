"""The stream of clips with what came before them."""

from pathlib import Path

import numpy as np
import pytest

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from tests.shard_sets import sample_of, write_set
from utils.errors import ConfigError

LENGTHS = (3, 4, 5, 6, 9)


def source(folder: Path, **settings: object) -> ClipSource:
    data = DataConfig(path=(str(folder),), n_frames=3, previous=True, num_workers=0, **settings)  # type: ignore[arg-type]
    return ClipSource(open_shards(data), data, seed=3, global_batch_size=5)


def first_batches(stream: ClipSource, count: int) -> list[tuple[int, list[int], bool]]:
    found = []
    for _, batch in zip(range(count), stream.batches(0), strict=False):
        clips = sample_of(batch["video"][:, :, 3:])
        found += [(sample, frames, flag) for (sample, frames), flag in zip(clips, batch["has_previous"].tolist(), strict=True)]
        for clip, flag, (_, frames) in zip(batch["video"][:, 2, :3, 0, 1].tolist(), batch["has_previous"].tolist(), clips, strict=True):
            assert clip == ([frames[0] - 3, frames[0] - 2, frames[0] - 1] if flag else [0, 0, 0])
        assert not batch["video"][~batch["has_previous"], :, :3].any()
    return found


@pytest.mark.parametrize("codec", ["npy", "mp4"])
def test_a_clip_comes_with_the_frames_before_it_where_there_are_any(tmp_path: Path, codec: str) -> None:
    sizes = (16, 16) if codec == "mp4" else (2, 4)
    write_set(tmp_path / "set", [5], lengths=LENGTHS, codec=codec, **({"size": sizes} if codec == "mp4" else {}))
    if codec == "mp4":  # lossy: only the flags can be told exactly
        batch = next(iter(source(tmp_path / "set").batches(0)))
        assert batch["video"].shape == (5, 3, 6, *sizes)
        assert int(batch["has_previous"].sum()) == 2
        return
    found = first_batches(source(tmp_path / "set"), 60)
    starts = {sample: {frames[0] for other, frames, _ in found if other == sample} for sample in range(5)}
    assert starts == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {3}, 4: {3, 4, 5, 6}}
    assert {sample for sample, _, flag in found if flag} == {3, 4}


def test_batches_do_not_depend_on_how_many_processes_read(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [5, 5], lengths=LENGTHS)
    data = DataConfig(path=(str(tmp_path / "set"),), n_frames=3, previous=True, num_workers=1)
    whole = next(iter(ClipSource(open_shards(data), data, seed=3, global_batch_size=4).batches(2)))
    parts = [
        next(iter(ClipSource(open_shards(data), data, seed=3, global_batch_size=4, rank=rank, world_size=2).batches(2))) for rank in (0, 1)
    ]
    for name in whole:
        assert np.array_equal(whole[name].numpy(), np.concatenate([part[name].numpy() for part in parts])), name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"clip_rule": "linspace"}, "--previous --clip-rule linspace"),
        ({"images": 2}, "--previous --num-images 2"),
        ({"n_frames": 4}, "--n-frames 4: its shortest video has 3 frames"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    write_set(tmp_path / "set", [5], lengths=LENGTHS)
    with pytest.raises(ConfigError) as caught:
        source(tmp_path / "set", **settings) if "n_frames" not in settings else ClipSource(
            open_shards(DataConfig(path=(str(tmp_path / "set"),))),
            DataConfig(path=(str(tmp_path / "set"),), previous=True, **settings),  # type: ignore[arg-type]
            seed=0,
            global_batch_size=5,
        )
    assert told in str(caught.value) and "\n" not in str(caught.value)
