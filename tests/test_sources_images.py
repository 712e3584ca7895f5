"""Pictures as clips of one frame, filters, and the data folders of the Latte tutorial, from files to training batches."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.shards import ShardSet
from tests.preprocessing import call, report, run
from tests.source_trees import listed, names, touch
from tests.videos import noise_frames, write_tree
from utils.errors import UserError

UCF_FILTER = "*WallPushups*\n*_PushUps*\n*_PullUps*\n*_TaiChi*\n"
"""The tutorial's filter file."""


def pictures(root: Path, files: list[str]) -> list[np.ndarray]:
    """Real pictures of 12 x 20, all different."""
    frames = noise_frames(len(files), size=(12, 20))
    for frame, name in zip(frames, files, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(root / name, quality=95)
    return list(frames)


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    files = ["cat/a/1.png", "cat/2.webp", "dog/10.bmp", "dog/2.jpg"]
    made = pictures(tmp_path / "in", files)
    (tmp_path / "in" / "dog" / "2.txt").write_text("a dog")
    touch(tmp_path / "in", ["dog/.hidden.png", "notes.md"])
    run(tmp_path / "in", "--dataset-name", "images", "--out", tmp_path / "set", "--image-size", 12, 20)
    shards = ShardSet.open(tmp_path / "set")
    assert (shards.num_samples, shards.meta["clip_length"], shards.classes, shards.codec) == (4, 1, ["cat", "dog"], "npy")
    assert "no fault" in call("verify", tmp_path / "set", "--workers", 1)
    data = DataConfig(path=(str(tmp_path / "set"),), num_workers=0)
    batch = next(ClipSource(shards, data, seed=0, global_batch_size=4).batches(0))
    video = batch["video"].numpy()
    assert video.shape == (4, 3, 1, 12, 20)
    for frame, name in zip(made, files, strict=True):
        error = np.abs(video[:, :, 0].astype(int) - frame.transpose(2, 0, 1)).mean(axis=(1, 2, 3))
        assert error.min() < (0.01 if name.endswith(("png", "bmp")) else 6), name
        assert batch["label"][error.argmin()] == int(name.startswith("dog"))


def test_grey_pictures_of_16_bits_are_those_of_8(tmp_path: Path) -> None:
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    (tmp_path / "in").mkdir()
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "in" / "1.png")
    run(tmp_path / "in", "--dataset-name", "images", "--out", tmp_path / "set", "--image-size", 8, 8)
    data = DataConfig(path=(str(tmp_path / "set"),), num_workers=0)
    video = next(ClipSource(ShardSet.open(tmp_path / "set"), data, seed=0, global_batch_size=1).batches(0))["video"]
    assert (video.numpy() == ramp).all()


def test_pictures_that_are_damaged_are_named_and_changed_ones_make_another_set(tmp_path: Path) -> None:
    pictures(tmp_path / "in", ["1.png", "2.png"])
    (tmp_path / "in" / "3.png").write_bytes((tmp_path / "in" / "2.png").read_bytes()[:200])
    run(tmp_path / "in", "--dataset-name", "images", "--out", tmp_path / "set", "--image-size", 8, 8)
    assert report(tmp_path / "set")["skipped"]["damaged"][0]["file"] == "3.png"  # type: ignore[index]
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(tmp_path / "in" / "2.png")
    text = run(tmp_path / "in", "--dataset-name", "images", "--out", tmp_path / "set", "--image-size", 8, 8, code=1)
    assert "made of other videos" in text


def test_pictures_have_one_frame_and_have_to_be_asked_for(tmp_path: Path) -> None:
    pictures(tmp_path / "in", ["1.png", "2.png"])
    assert "clips of --dataset-name images have 1 frame" in run(
        tmp_path / "in", "--dataset-name", "images", "--clip-length", 4, "--out", tmp_path / "set", code=2
    )
    assert names(tmp_path / "in", "frames") == ["."]
    with pytest.raises(UserError, match="holds no pictures"):
        listed(touch(tmp_path / "x", ["a.mp4"]), "images")


UCF_CLASSES = ("Archery", "PullUps", "PushUps", "TaiChi", "WallPushups")


def ucf_files() -> list[str]:
    return [f"{name}/v_{name}_g{g:02d}_c01.avi" for name in UCF_CLASSES for g in (1, 2)]


def test_a_filter_takes_each_video_once_and_names_what_matches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = ucf_files()
    touch(tmp_path / "UCF-101", files)
    (tmp_path / "filter.txt").write_text(UCF_FILTER + "\n*Push*\nv_TaiChi_g01_c01\n*Nobody*\nArchery/*_g02_*\nArchery_g01\n")
    found = listed(tmp_path, "UCF101", filter=tmp_path / "filter.txt")
    assert [video.name for video in found.videos] == [name for name in files if name != files[0]]
    assert found.missing == ["*Nobody*", "Archery_g01"] and "matches *Nobody*, Archery_g01" in caplog.text
    (tmp_path / "own.txt").write_text(UCF_FILTER)
    found = listed(tmp_path, "UCF101", filter=tmp_path / "own.txt")
    assert found.classes == list(UCF_CLASSES[1:]) and not found.missing
    assert all(video.name.startswith(found.classes[video.label] + "/") for video in found.videos)


def test_filters_match_names_of_files_folders_and_spans(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("a*\n")
    (tmp_path / "plain.txt").write_text("b.c\nsub/d\n")
    root = touch(tmp_path / "x", ["a1.mp4", "ba.mp4", "a/ba.mp4", "b.c.mp4", "sub/d.mp4", "d.mp4"])
    assert names(root, "folder", filter=tmp_path / "f.txt") == ["a1.mp4"]
    assert names(root, "folder", filter=tmp_path / "plain.txt") == ["b.c.mp4", "sub/d.mp4"]
    frames = touch(tmp_path / "y", ["a.1/1.png", "b/1.png"])
    assert names(frames, "frames", filter=tmp_path / "f.txt") == ["a.1"]
    (root / "m.csv").write_text("path,start,end,label\na1.mp4,0,1,3\na1.mp4,1,2,3\nba.mp4,0,1,5\n")
    spans = listed(root / "m.csv", "manifest", filter=tmp_path / "f.txt")
    assert [video.name for video in spans.videos] == ["a1.mp4@0-1", "a1.mp4@1-2"]
    assert spans.classes == [str(number) for number in range(6)], "class numbers keep their meaning"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "--filter: cannot read .*f.txt: No such file"),
        (b"\n \n", "f.txt is empty: it should have one pattern a line"),
        (b"\xff\xfe*\x00", "f.txt is not UTF-8"),
        (b"*nothing*", r"no video of .* matches a pattern of .*f.txt, such as \*nothing\*"),
        (b"x" * 2000, "is no list of patterns"),
    ],
)
def test_a_filter_that_cannot_be_used_is_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    touch(tmp_path / "in", ["1.mp4"])
    if content is not None:
        (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        listed(tmp_path / "in", "folder", filter=tmp_path / "f.txt")
    assert "\n" not in str(caught.value)


def test_the_tutorials_flat_folder_of_mp4_files(tmp_path: Path) -> None:
    """Its moving MNIST: whole frames resized to 18 x 32, no classes."""
    write_tree(tmp_path / "mmnist-easy", ["v0.mp4", "v1.mp4", "v2.mp4"], frames=20)
    run(tmp_path / "mmnist-easy", "--out", tmp_path / "set", "--image-size", 18, 32, "--resize", "stretch", "--clip-length", "video")
    shards = ShardSet.open(tmp_path / "set")
    assert (sorted(shards.frames.tolist()), shards.classes, shards.size) == ([20, 21, 22], [], (18, 32))
    data = DataConfig(path=(str(tmp_path / "set"),), n_frames=4, frame_interval=2, clip_rule="linspace", num_workers=0)
    batch = next(ClipSource(shards, data, seed=0, global_batch_size=3).batches(0))
    assert batch["video"].shape == (3, 3, 4, 18, 32)


def test_the_tutorials_ucf101_with_its_filter(tmp_path: Path) -> None:
    """Class folders, as the archive has them; its filter leaves four classes, each video once though two patterns match it."""
    write_tree(tmp_path / "UCF101", ucf_files(), frames=8)
    (tmp_path / "ucf_filter.txt").write_text(UCF_FILTER)
    flags = ["--image-size", 16, 16, "--preset", "latte-tutorial-square", "--clip-length", "video"]
    run(tmp_path / "UCF101", "--filter", tmp_path / "ucf_filter.txt", "--out", tmp_path / "set", *flags)
    shards = ShardSet.open(tmp_path / "set")
    index = json.loads((tmp_path / "set" / "index.json").read_bytes())
    assert (shards.num_samples, index["source"], shards.classes) == (8, "UCF101", list(UCF_CLASSES[1:]))
    assert "no fault" in call("verify", tmp_path / "set", "--workers", 1)
    (tmp_path / "ucf_filter.txt").write_text("*TaiChi*\n*Juggling*\n")
    run(tmp_path / "UCF101", "--filter", tmp_path / "ucf_filter.txt", "--out", tmp_path / "two", *flags)
    missing = report(tmp_path / "two")["skipped"]["missing"]  # type: ignore[index]
    assert [row["file"] for row in missing] == ["*Juggling*"] and ShardSet.open(tmp_path / "two").num_samples == 2
    text = run(tmp_path / "UCF101", "--filter", tmp_path / "ucf_filter.txt", "--out", tmp_path / "set", *flags, code=1)
    assert "made of other videos" in text
