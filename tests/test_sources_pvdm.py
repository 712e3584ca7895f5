"""PVDM's two sets as docs/data.md says to prepare them: their folders, their splits, and their short clips."""

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
from tests.source_trees import frames, listed, names, touch, ucf
from tests.videos import noise_frames, write_video

AS_DOCUMENTED = ("--clip-length", "video", "--min-frames", 16, "--image-size", 16, 16, "--preset", "pvdm", "--codec", "npy")


def lists(folder: Path, train: list[str], test: list[str]) -> None:
    """ucfTrainTestlist with fold 1."""
    folder.mkdir(parents=True)
    (folder / "trainlist01.txt").write_text("".join(f"{name} 1\n" for name in train))
    (folder / "testlist01.txt").write_text("".join(f"{name}\n" for name in test))


def sky(root: Path, **clips: int) -> Path:
    """<split>/<video>/<clip>/<picture>: `train_Video_1=20` is 20 pictures of the clip Video_1, not numbered with zeros in front."""
    for name, count in clips.items():
        split, video, number = name.split("_")
        folder = root / split / video / f"{video}_{number}"
        folder.mkdir(parents=True)
        for k, picture in enumerate(noise_frames(count, (18, 32), seed=len(name))):
            picture[:2] = 4 * k
            Image.fromarray(picture).save(folder / f"{video}_{number}_frames_{k}.png")
    return root


def pairs(folder: Path, batch: int) -> ClipSource:
    data = DataConfig(path=(str(folder),), n_frames=16, previous=True, num_workers=0)
    return ClipSource(open_shards(data), data, seed=0, global_batch_size=batch)


@pytest.mark.parametrize("place", ["UCF-101/ucfTrainTestlist", "ucfTrainTestlist"])
@pytest.mark.parametrize("root", ["", "UCF-101"])
def test_lists_of_ucf101_lie_inside_the_folder_or_beside_it(tmp_path: Path, root: str, place: str) -> None:
    files = ucf(tmp_path / "UCF-101")
    train, test = files[4:], files[:4]
    lists(tmp_path / place, train, test)
    assert names(tmp_path / root, "UCF101", split="train") == train
    assert names(tmp_path / root, "UCF101", split="test") == test
    assert listed(tmp_path / root, "UCF101", split="test").classes == ["Archery", "Biking"], "numbers of classes are those of all videos"


def test_ucf101s_test_videos_are_held_out_and_its_short_ones_counted(tmp_path: Path) -> None:
    """In the release what is called the test set is the training set, and a video of less than two clips breaks a loader process."""
    lengths = {"g01_c01": 40, "g02_c01": 33, "g03_c01": 29, "g04_c01": 16, "g05_c01": 9, "g06_c01": 36}
    files = [f"Archery/v_Archery_{part}.avi" for part in lengths]
    for name, count in zip(files, lengths.values(), strict=True):
        write_video(tmp_path / "UCF-101" / name, noise_frames(count, (24, 32), seed=count), codec="mpeg4")
    lists(tmp_path / "UCF-101" / "ucfTrainTestlist", files[:5], files[5:])
    text = {split: run(tmp_path / "UCF-101", "--split", split, "--out", tmp_path / split, *AS_DOCUMENTED) for split in ("train", "test")}
    assert (
        "skipped 1: too short\n  Archery/v_Archery_g05_c01.avi  fewer than 16 frames" in text["train"]
        and "nothing was skipped" in text["test"]
    )
    assert "too short" in str(report(tmp_path / "train"))
    found = {split: ShardSet.open(tmp_path / split) for split in ("train", "test")}
    assert sorted(found["train"].frames.tolist()) == [16, 29, 33, 40] and found["test"].frames.tolist() == [36]
    batch = next(iter(pairs(tmp_path / "train", 4).batches(0)))
    assert int(batch["has_previous"].sum()) == 2, "short ones are clips with nothing before them"
    assert batch["video"].shape == (4, 3, 32, 16, 16)


def test_sky_in_its_two_levels(tmp_path: Path) -> None:
    """Whole names of folders count: a video with `val` or `train` in its name is in no other split for that, and is not lost."""
    root = touch(
        tmp_path / "SKY",
        frames("train/validation-Q/validation-Q_1", "train/valley/valley_2", "train/valley/valley_10", "test/trainride/trainride_1"),
    )
    train = ["train/validation-Q/validation-Q_1", "train/valley/valley_2", "train/valley/valley_10"]
    assert detect(root) == "SkyTimelapse" and names(root, "SkyTimelapse", split="train") == train
    assert names(root, "SkyTimelapse", split="test") == ["test/trainride/trainride_1"]
    assert {video.group for video in listed(root, "SkyTimelapse").videos} == {"validation-Q", "valley", "trainride"}


def test_sky_is_prepared_as_documented(tmp_path: Path) -> None:
    root = sky(tmp_path / "SKY", train_Aa_1=34, train_Aa_2=20, train_valBb_1=16, train_Bb_1=15, test_trainCc_1=33)
    for split in ("train", "test"):
        run(root, "--split", split, "--out", tmp_path / split, *AS_DOCUMENTED)
    train, test = (ShardSet.open(tmp_path / split) for split in ("train", "test"))
    assert sorted(train.frames.tolist()) == [16, 20, 34] and test.frames.tolist() == [33]
    assert "too short" in str(report(tmp_path / "train")) and "Bb_1" in str(report(tmp_path / "train"))
    seen = set()
    for _, batch in zip(range(20), pairs(tmp_path / "train", 3).batches(0), strict=False):
        for clip, flag in zip(batch["video"], batch["has_previous"].tolist(), strict=True):
            numbers = (clip[0, :, 0, 0].int() // 4).tolist()
            own = numbers if flag else numbers[16:]
            assert own == list(range(own[0], own[0] + len(own))), "in natural order: 2 before 10"
            assert flag or not clip[:, :16].any()
            seen.add((flag, own[0]))
    assert seen == {(True, 0), (True, 1), (True, 2)} | {(False, start) for start in range(5)}


def test_pictures_are_cut_to_the_square_and_not_smoothed(tmp_path: Path) -> None:
    """To the pixel as the release, before rounding (tests/parity holds its numbers); its filter lets stripes through."""
    root = sky(tmp_path / "SKY", train_Aa_1=16)
    run(root, "--split", "train", "--out", tmp_path / "out", *AS_DOCUMENTED)
    stored = next(iter(pairs(tmp_path / "out", 1).batches(0)))["video"][0, :, 16:].permute(1, 2, 3, 0).numpy()
    folder = root / "train" / "Aa" / "Aa_1"
    pictures = np.stack([np.asarray(Image.open(folder / f"Aa_1_frames_{k}.png")) for k in range(16)])
    square = pictures[:, :, 7:25]
    assert (stored == resize_clip(square, (16, 16), "stretch", antialias=False)).all()
    assert (stored != resize_clip(square, (16, 16), "stretch", antialias=True)).any()
