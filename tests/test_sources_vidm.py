"""The sets of VIDM as they are prepared and learnt: CLEVRER as videos and as pictures, interleaved clips of TaiChi-HD, all of UCF-101."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from datasets.shards import ShardSet
from datasets.sources import detect
from datasets.triples import Take
from tests.preprocessing import run
from tests.source_trees import listed, names, touch, ucf
from utils.errors import UserError
from utils.media import encode_mp4

N = 8
RULES = ("--image-size", 16, 16, "--preset", "vidm", "--clip-length", N, "--codec", "npy")
VIDEOS = {"train": (0, 1), "val": (10000, 10001)}
LENGTH = 19
"""Two windows and a rest."""


def shades(number: int, count: int) -> np.ndarray:
    """Frames t 24 36 3 whose first channel says the frame, and whose second the split."""
    frames = np.zeros((count, 24, 36, 3), dtype=np.uint8)
    frames[..., 0] = 8 * np.arange(count)[:, None, None]
    frames[..., 1] = 100 if number < 10000 else 200
    return frames


def clevrer(root: Path, kind: str) -> Path:
    """The data set as its archives unpack, as the release gathers the videos, or as it writes their frames."""
    folders = {"archives": ("video_train/video_00000-01000", "video_validation/video_10000-11000"), "gathered": ("train_vid", "val_vid")}
    for numbers, folder in zip(VIDEOS.values(), folders.get(kind, ("train", "val")), strict=True):
        for number in numbers:
            frames, place = shades(number, LENGTH), root / folder / f"video_{number:05d}"
            place.parent.mkdir(parents=True, exist_ok=True)
            if kind != "pictures":
                place.with_suffix(".mp4").write_bytes(encode_mp4(frames, 25))
                continue
            place.mkdir()
            for k, frame in enumerate(frames, start=1):
                Image.fromarray(frame).save(place / f"frame{k:05d}.png")
    return root


def stream(folder: Path, take: Take, batch: int, **data: object) -> list[dict[str, np.ndarray]]:
    setting = DataConfig(**{"path": (str(folder),), "n_frames": N, "num_workers": 0} | data)  # type: ignore[arg-type]
    source = ClipSource(open_shards(setting), setting, seed=0, global_batch_size=batch, take=take)
    return [{name: value.numpy() for name, value in found.items()} for found in islice(source.batches(0), 120)]


def said(video: np.ndarray) -> tuple[list[list[int]], set[str]]:
    """Which frames of their videos are in clips b c t h w, and of which splits they are."""
    numbers = np.rint(video[:, 0].mean(axis=(2, 3)) / 8).astype(int).tolist()
    return numbers, {"train" if shade < 150 else "val" for shade in video[:, 1].mean(axis=(1, 2, 3))}


@pytest.mark.parametrize("kind", ["archives", "gathered", "pictures"])
def test_clevrer_is_prepared_and_learnt_without_validation(tmp_path: Path, kind: str) -> None:
    """The release writes no frames of training videos, and then trains on those of both splits."""
    root = clevrer(tmp_path / "CLEVRER", kind)
    assert detect(root) == "CLEVRER"
    for split in VIDEOS:
        run(root, "--split", split, "--out", tmp_path / split, *RULES)
        assert ShardSet.open(tmp_path / split).frames.tolist() == [N] * 4, "two windows of each of two videos, the rest is dropped"
        seen = set()
        for batch in stream(tmp_path / split, "triple", 4):
            numbers, splits = said(batch["video"])
            assert splits == {split}
            for (first, previous, current), r in zip(numbers, batch["frame"].tolist(), strict=True):
                assert first in (0, N) and (previous, current) == (first + r - 1, first + r)
                seen.add(r)
        assert seen == set(range(1, N))
        for batch in stream(tmp_path / split, "first", 4):
            numbers, splits = said(batch["video"])
            assert splits == {split} and {frame for (frame,) in numbers} <= {0, N}


def test_folders_of_clevrer_frames(tmp_path: Path) -> None:
    files = [f"{folder}/frame{k:05d}.png" for folder in ("train/video_00003", "val/video_10000", "val/video_00007") for k in (1, 2)]
    root = touch(tmp_path / "x", files)
    assert detect(root) == "CLEVRER"
    found = listed(root, "CLEVRER").videos
    assert [(video.name, video.split, video.is_frames) for video in found] == [
        ("train/video_00003", "train", True),
        ("val/video_00007", "val", True),
        ("val/video_10000", "val", True),
    ]
    assert names(root / "val", "CLEVRER", split="train") == ["video_00007"], "without a split's folder the number decides"
    touch(root, ["val/video_00003/frame00001.png"])
    with pytest.raises(UserError, match="video_00003 is there twice"):
        listed(root, "CLEVRER")
    touch(root, ["val/other/frame00001.png"])
    with pytest.raises(UserError, match="other is not a folder video_<5 digits> of frames"):
        listed(root, "CLEVRER")


def test_videos_of_clevrer_go_before_pictures_of_them(tmp_path: Path) -> None:
    """The release keeps both in one folder."""
    root = touch(tmp_path / "x", ["train_vid/video_00003.mp4", "train/video_00003/frame00001.png"])
    assert names(root, "CLEVRER") == ["train_vid/video_00003.mp4"]


@pytest.mark.parametrize(
    "files",
    [
        ["video_00001/frame1.png", "other/frame1.png"],
        ["video_00001/picture1.png"],
        ["3/video_00001/frame1.png"],
        ["video_00001/frame1.png", "frame1.png"],
    ],
)
def test_other_folders_of_frames_are_not_taken_for_clevrer(tmp_path: Path, files: list[str]) -> None:
    assert detect(touch(tmp_path / "x", files)) == "frames"


def test_interleaved_clips_of_taichi(tmp_path: Path) -> None:
    """Windows of 4 N frames hold four clips of every fourth frame."""
    folder = tmp_path / "TaiChi" / "train" / "trainer#0#1.mp4"
    folder.mkdir(parents=True)
    for k, frame in enumerate(shades(0, 19)):
        Image.fromarray(frame).save(folder / f"{k}.png")
    run(tmp_path / "TaiChi", "--split", "train", "--out", tmp_path / "out", *RULES[:-3], 16, *RULES[-2:])
    assert ShardSet.open(tmp_path / "out").frames.tolist() == [16]
    seen = set()
    for batch in stream(tmp_path / "out", "triple", 1, n_frames=4, frame_interval=4):
        ((first, previous, current),), _ = said(batch["video"])
        r = int(batch["frame"][0])
        assert (previous, current) == (first + 4 * (r - 1), first + 4 * r)
        seen.add((first, r))
    assert seen == {(first, r) for first in range(4) for r in range(1, 4)}


def test_all_of_ucf101_is_both_lists_together(tmp_path: Path) -> None:
    root = tmp_path / "UCF-101"
    files = ucf(root)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    for split, part in (("train", files[::2]), ("test", files[1::2])):
        (lists / f"{split}list01.txt").write_text("\n".join(part))
    both = [name for split in ("train", "test") for name in names(root, "UCF101", split=split)]
    assert sorted(both) == sorted(names(root, "UCF101")) == sorted(files)
