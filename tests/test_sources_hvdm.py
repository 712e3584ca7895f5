"""HVDM's sets as docs/data.md says to prepare them: TaiChi's frames in folders or flat, as the other two in rules and in short clips."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from datasets.shards import ShardSet
from datasets.sources import detect
from datasets.transforms import resize_clip
from tests.preprocessing import report, run
from tests.source_trees import frames, names, touch
from tests.videos import noise_frames

AS_DOCUMENTED = ("--clip-length", "video", "--min-frames", 16, "--image-size", 16, 16, "--preset", "hvdm", "--codec", "npy")
LENGTHS = {"train/Ab#1#9": 34, "train/Ab#20#30": 20, "train/Cd_e#1#2": 16, "train/valf": 15, "test/trainer": 33}
"""<split>/<video> -> pictures; one video is too short, and names of splits are parts of names of videos."""


def taichi(root: Path, layout: str) -> Path:
    """Pictures of LENGTHS, not numbered with zeros in front, in a folder each or side by side; brightness says which frame it is."""
    for name, count in LENGTHS.items():
        split, video = name.split("/")
        folder = root / split / f"{video}.mp4" if layout == "folders" else root / split
        folder.mkdir(parents=True, exist_ok=True)
        for k, picture in enumerate(noise_frames(count, (18, 32), seed=len(name))):
            picture[:2] = 4 * k
            Image.fromarray(picture).save(folder / (f"{k}.png" if layout == "folders" else f"{video}_{k}.png"))
    return root


def stream(folder: Path, batch: int, **data: object) -> ClipSource:
    setting = DataConfig(path=(str(folder),), n_frames=16, num_workers=0, **data)  # type: ignore[arg-type]
    return ClipSource(open_shards(setting), setting, seed=0, global_batch_size=batch)


def numbers(clip: np.ndarray) -> list[int]:
    """Which frame of its video each of a clip's (c, t, h, w) is."""
    return [int(value) // 4 for value in clip[0, :, 0, 0]]


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_taichi_is_prepared_as_documented(tmp_path: Path, layout: str) -> None:
    """The release's loader of the set ends in an error, whatever the layout."""
    root = taichi(tmp_path / "TaiChi", layout)
    assert detect(root) == "TaiChi"
    text = {split: run(root, "--split", split, "--out", tmp_path / split, *AS_DOCUMENTED) for split in ("train", "test")}
    train, test = (ShardSet.open(tmp_path / split) for split in ("train", "test"))
    assert sorted(train.frames.tolist()) == [16, 20, 34] and test.frames.tolist() == [33], "the whole name of the folder is the split"
    assert "skipped 1: too short" in text["train"] and "valf" in str(report(tmp_path / "train")) and "nothing was skipped" in text["test"]
    pairs, seen = stream(tmp_path / "train", 3, previous=True), set()
    for _, batch in zip(range(12), pairs.batches(0), strict=False):
        for clip, flag in zip(batch["video"].numpy(), batch["has_previous"].tolist(), strict=True):
            own = numbers(clip) if flag else numbers(clip)[16:]
            assert own == list(range(own[0], own[0] + len(own))), "in natural order: 2 before 10"
            assert flag or not clip[:, :16].any()
            seen.add(flag)
    assert seen == {True, False}, "videos of less than two clips are clips with nothing before them"


def test_pictures_are_cut_to_the_square_and_not_smoothed(tmp_path: Path) -> None:
    root = taichi(tmp_path / "TaiChi", "flat")
    run(root, "--split", "test", "--out", tmp_path / "out", *AS_DOCUMENTED)
    stored = next(iter(stream(tmp_path / "out", 1).batches(0)))["video"][0].permute(1, 2, 3, 0).numpy()
    first = numbers(stored.transpose(3, 0, 1, 2))[0]
    pictures = np.stack([np.asarray(Image.open(root / "test" / f"trainer_{first + k}.png")) for k in range(16)])
    assert (stored == resize_clip(pictures[:, :, 7:25], (16, 16), "stretch", antialias=False)).all()


def test_the_distance_of_frames_is_a_setting(tmp_path: Path) -> None:
    """How far apart the paper takes TaiChi's frames is not known."""
    root = taichi(tmp_path / "TaiChi", "flat")
    run(root, "--split", "all", "--out", tmp_path / "out", *AS_DOCUMENTED, "--min-frames", 31)
    clips = stream(tmp_path / "out", 2, frame_interval=2)
    for _, batch in zip(range(8), clips.batches(0), strict=False):
        for clip in batch["video"].numpy():
            own = numbers(clip)
            assert own == list(range(own[0], own[0] + 32, 2))
    assert stream(tmp_path / "out", 1).data.frame_interval == 1


def test_pictures_of_sky_may_lie_flat_too(tmp_path: Path) -> None:
    """The release's README says so; its loader reads two levels of folders and nothing else."""
    flat = [f"{split}/{video}_{k}.png" for split, video in (("train", "aa_1"), ("train", "val_2"), ("test", "bb_1")) for k in range(11)]
    root = touch(tmp_path / "SKY", flat)
    assert detect(root) == "SkyTimelapse" and names(root, "SkyTimelapse", split="train") == ["train/aa_1", "train/val_2"]
    deep = touch(tmp_path / "deep" / "SKY", frames("train/a/a_1", "test/b/b_1"))
    assert detect(deep) == "SkyTimelapse"
