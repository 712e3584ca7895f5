"""Layouts on disk -> the list of videos: detection, order, classes by folder; and one clear line for what is wrong."""

import json
import os
from pathlib import Path

import pytest

from datasets.sources import SOURCES, detect, list_videos
from datasets.sources.base import SourceOptions
from datasets.sources.splits import folder_split
from tests.source_trees import frames, listed, names, touch, ucf
from utils.errors import UserError

LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "UCF101": ("any", ["Archery/v_Archery_g01_c01.avi", "Biking/v_Biking_g02_c01.avi"]),
    "SkyTimelapse": ("any", frames("sky_train/07iAmXYqIfc/07iAmXYqIfc_1", "sky_test/a-cdefghijk/a-cdefghijk_4")),
    "TaiChi": ("any", frames("train/--_nSYVHdE4#000123#000456.mp4", "test/0Bc-EfghijK#001#200.mp4")),
    "MovingMNIST": ("mmnist-easy", ["1.mp4", "2.mp4"]),
    "CLEVRER": ("any", ["video_train/video_00000-01000/video_00000.mp4", "video_validation/video_10000-11000/video_10000.mp4"]),
    "webdataset": ("any", ["00000.tar", "00001.tar"]),
    "folder": ("any", ["cats/1.mp4", "dogs/2.webm"]),
    "frames": ("any", frames("one", "two")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_detected(tmp_path: Path, layout: str) -> None:
    folder, files = LAYOUTS[layout]
    assert detect(touch(tmp_path / folder, files)) == layout


@pytest.mark.parametrize(
    ("folder", "files", "layout"),
    [
        ("SKY", frames("train/video_a/clip1", "test/video_b/clip1"), "SkyTimelapse"),
        ("x", frames("train/abc/abc_1", "val/d/d_9"), "SkyTimelapse"),
        ("taichi", ["train/video_1.png", "train/video_2.png"], "TaiChi"),
        ("x", frames("train/abc", "test/d"), "frames"),
        ("x", ["v_Archery_g01_c01.avi"], "UCF101"),
        ("x", ["v_Archery_g01_c01.avi", "other.avi"], "folder"),
        ("x", ["video_00001.mp4", "thumbnail.png"], "CLEVRER"),
        ("x", ["3/video_00003.mp4", "4/video_00004.mp4"], "folder"),
        ("x", ["val_vid/video_10000.mp4", "train_vid/video_00000.mp4"], "CLEVRER"),
        ("mnist", ["deep/er/1.mp4"], "folder"),
        ("x", ["1.mp4", "1.tar"], "folder"),
        ("x", ["a/1.png", "1.tar"], "frames"),
        ("x", [".hidden/1.mp4", "a/1.png"], "frames"),
        ("x", ["notes.doc"], "folder"),
    ],
)
def test_detection_claims_no_more_than_it_knows(tmp_path: Path, folder: str, files: list[str], layout: str) -> None:
    assert detect(touch(tmp_path / folder, files)) == layout


def test_files_are_detected(tmp_path: Path) -> None:
    touch(tmp_path, ["a.csv", "a.jsonl", "a.PARQUET", "a.tar", "a.mp4"])
    assert [detect(tmp_path / f"a.{suffix}") for suffix in ("csv", "jsonl", "PARQUET", "tar")] == ["manifest"] * 3 + ["webdataset"]
    with pytest.raises(UserError, match=r"it is a file; give the folder, a manifest \(\.csv .* or a \.tar$"):
        listed(tmp_path / "a.mp4", detect(tmp_path / "a.mp4"))


def test_the_output_folder_is_not_looked_into(tmp_path: Path) -> None:
    touch(tmp_path, ["a/1.png", "shards/source/1.mp4"])
    assert detect(tmp_path, exclude=tmp_path / "shards") == "frames"
    assert names(tmp_path, "folder") == ["shards/source/1.mp4"]
    with pytest.raises(UserError, match="holds no videos"):
        listed(tmp_path, "folder", exclude=tmp_path / "shards")


def test_every_layout_has_what_the_help_and_the_checks_read() -> None:
    for name, source in SOURCES.items():
        assert source.name == name and source.summary and "\n" not in source.summary and source.kind in ("videos", "frames")
        assert source.honours <= {"fold", "split_lists", "captions"}


# Order


def test_the_order_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    files = [f"{number}.mp4" for number in range(40)]
    one, two = touch(tmp_path / "a", files), touch(tmp_path / "b", files[::-1])
    order = [
        [video.name for video in list_videos(root, "folder", SourceOptions(), seed).videos] for root, seed in ((one, 0), (two, 0), (one, 1))
    ]
    assert order[0] == order[1] != order[2] and sorted(order[0]) == sorted(files) != order[0]


# Folders


def test_folder_takes_classes_splits_and_captions(tmp_path: Path) -> None:
    root = touch(tmp_path / "plain", ["class10/a.mp4", "class2/b.MP4", "class2/deep/c.mp4", "class2/.d.mp4", "class2/note.md"])
    (root / "class2" / "b.txt").write_text("\ufeffa dog\n", encoding="utf-8")
    found = listed(root, "folder")
    assert found.classes == ["class2", "class10"]
    assert [(v.name, v.label, v.caption) for v in found.videos] == [
        ("class2/b.MP4", 0, "a dog"), ("class2/deep/c.mp4", 0, ""), ("class10/a.mp4", 1, ""),
    ]  # fmt: skip
    touch(root, ["top.mp4"])
    assert listed(root, "folder").classes == []
    split = touch(tmp_path / "split", ["train/cat/1.mp4", "train/dog/2.mp4", "validation/dog/3.mp4"])
    assert listed(split, "folder", split="val").classes == ["cat", "dog"] and names(split, "folder", split="val") == [
        "validation/dog/3.mp4"
    ]
    touch(split, ["other/dog/4.mp4"])
    assert listed(split, "folder").classes == ["other", "train", "validation"], "not all are splits: they are classes"


def test_split_folders_are_whole_names() -> None:
    words = (
        "train",
        "Training",
        "sky_train",
        "video_train",
        "train_vid",
        "val",
        "valid",
        "video_validation",
        "val_vid",
        "TEST",
        "sky_test",
    )
    assert [folder_split(word) for word in words] == ["train"] * 5 + ["val"] * 4 + ["test"] * 2
    assert not any(folder_split(word) for word in ("", "carnival", "trains", "a_train", "test1", "train_val", "val-7iAmXYqIfc"))


def test_shard_sets_among_the_sources_are_passed_over(tmp_path: Path) -> None:
    made = ["shards/index.json", "shards/shard-00000.tar", "shards/sheet.png", "shards/source/1.png"]
    assert names(touch(tmp_path / "x", [*frames("one", "two"), *made]), "frames") == ["one", "two"]
    root = touch(tmp_path / "y", ["1.mp4", "web/index.json", "web/2.mp4"])
    assert names(root, "folder") == ["1.mp4", "web/2.mp4"]
    assert names(touch(tmp_path / "z", ["index.json", "shard-00000.tar", "1.mp4"]), "folder") == ["1.mp4"], "the root was asked for"


def test_videos_of_no_split_are_counted_and_groups_of_ucf101_stay_together_anywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ucf(tmp_path / "UCF-101")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\nArchery/v_Archery_g01_c02.avi 1\n")
    assert len(names(tmp_path, "UCF101", split="train", split_lists=tmp_path)) == 2
    assert "30 videos are in no split and are left out, Archery/v_Archery_g02_c01.avi is one" in caplog.text
    root = touch(tmp_path / "x", [f"{c}/v_{c}_g{g:02d}_c{n:02d}.mp4" for c in "ab" for g in range(1, 9) for n in (1, 2)] + ["a/v.mp4"])
    held = names(root, "folder", split="val", val_fraction=0.5)
    rest = names(root, "folder", split="train", val_fraction=0.5)
    assert len(held + rest) == 33 and len(held) > 2 and not {n[:-8] for n in held} & {n[:-8] for n in rest}


def test_links_in_a_circle_end_and_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path / "x", ["a/1.mp4"])
    (root / "a" / "again").symlink_to(root)
    assert names(root, "folder") == ["a/1.mp4"]
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (root / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed: Permission denied"):
        listed(root, "folder")


def test_frames_are_folders_or_the_root(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", ["walk/a/2.png", "walk/a/10.png", "run/b/1.jpg", "stray.png"])
    found = listed(root, "frames")
    assert [(v.name, v.label) for v in found.videos] == [("run/b", 0), ("walk/a", 1)] and found.classes == ["run", "walk"]
    assert [path.name for path in found.videos[1].frame_paths()] == ["2.png", "10.png"] and found.videos[1].content_id() == [2]
    assert names(root / "run" / "b", "frames") == ["."]
    (tmp_path / "c.json").write_text(json.dumps({"walk/a": "a walk"}))
    assert [v.caption for v in listed(root, "frames", captions=tmp_path / "c.json").videos] == ["", "a walk"]


# Wrong layouts and options


@pytest.mark.parametrize(
    ("layout", "files", "words"),
    [
        ("UCF101", ["a/1.txt"], "holds no videos"),
        ("SkyTimelapse", frames("train/a/b/c"), "it is split/video/frame or split/recording/video/frame; try --dataset-name frames"),
        ("SkyTimelapse", frames("train/a", "other/b"), "is beside the folders of SkyTimelapse's splits"),
        ("SkyTimelapse", ["a/1.mp4"], "holds no pictures"),
        ("TaiChi", frames("train/a/b"), "TaiChi has none"),
        ("TaiChi", ["train/picture.png"], "is not named <video>_<number>"),
        ("TaiChi", [*frames("a"), "a_1.png"], "is there twice"),
        ("CLEVRER", ["a.mp4"], "not named video_<5 digits>.mp4"),
        ("MovingMNIST", ["a.png"], "holds no videos"),
        ("webdataset", ["a.mp4", "a.tar.gz"], "holds no .tar files"),
        ("manifest", ["a.mp4"], "is no manifest"),
        ("folder", [], "holds no videos"),
        ("frames", ["a.mp4"], "holds no pictures"),
        ("Squares", [], "none of UCF101, SkyTimelapse"),
    ],
)
def test_a_wrong_layout_is_one_clear_line(tmp_path: Path, layout: str, files: list[str], words: str) -> None:
    tmp_path.joinpath("x").mkdir()
    with pytest.raises(UserError) as error:
        listed(touch(tmp_path / "x", files), layout)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "layout", "options", "words"),
    [
        (["1.mp4"], "folder", {"fold": 2}, "--fold means nothing to the layout folder: it is for UCF101"),
        (["1.mp4"], "folder", {"split_lists": Path("x")}, "--split-lists means nothing"),
        (
            ["1.tar"],
            "webdataset",
            {"captions": Path("x")},
            "--captions means nothing to the layout webdataset: it is for MovingMNIST, folder",
        ),
        (["1.mp4"], "folder", {"split": "dev"}, "none of all, train, val, test"),
        (["1.mp4"], "folder", {"split": "val"}, "has no official split; say --val-fraction"),
        (["1.mp4"], "folder", {"split": "val", "val_fraction": 1e-9}, "leaves no video of"),
        (["1.mp4"], "folder", {"val_fraction": 0.5}, "say which, --split train or --split val"),
        (["train/1.mp4", "val/2.mp4"], "folder", {"split": "val", "val_fraction": 0.5}, "has a val split of its own"),
        (["train/1.mp4", "test/2.mp4"], "folder", {"split": "val"}, "has test, train; --val-fraction holds out a share of train as val"),
        (["val/1.mp4", "test/2.mp4"], "folder", {"split": "train"}, "has test, val"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_one_clear_line(
    tmp_path: Path, files: list[str], layout: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError) as error:
        listed(touch(tmp_path, files), layout, **options)
    assert words in str(error.value) and "\n" not in str(error.value)
