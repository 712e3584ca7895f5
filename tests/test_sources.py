"""Layouts on disk -> the list of videos: names, labels, splits, groups, captions, spans; and one clear line for what is wrong."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.sources import SOURCES, detect, list_videos
from datasets.sources.base import Listing, SourceOptions, Video, class_names, natural_key
from datasets.sources.splits import folder_split, held_out, select
from utils.errors import UserError


def touch(root: Path, names: Sequence[str]) -> Path:
    """Files that only have names: listing must not need more."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def listed(root: Path, name: str, **options: object) -> Listing:
    """A listing in order of the names."""
    found = list_videos(root, name, SourceOptions(**options), seed=0)  # type: ignore[arg-type]
    return Listing(sorted(found.videos, key=lambda video: natural_key(video.name)), found.classes, found.missing, found.rejected)


def names(root: Path, name: str, **options: object) -> list[str]:
    return [video.name for video in listed(root, name, **options).videos]


def frames(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number:05d}.png" for folder in folders for number in range(count)]


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


# UCF-101


def ucf(root: Path) -> list[str]:
    files = [f"{c}/v_{c}_g{g:02d}_c{n:02d}.avi" for c in ("Archery", "Biking") for g in range(1, 9) for n in (1, 2)]
    touch(root, files)
    return files


def test_ucf101_groups_lists_and_share(tmp_path: Path) -> None:
    files = ucf(tmp_path / "UCF-101")
    assert {v.group for v in listed(tmp_path, "UCF101").videos} == {f"{c}/g{g:02d}" for c in ("Archery", "Biking") for g in range(1, 9)}
    held = names(tmp_path, "UCF101", split="val", val_fraction=0.4)
    rest = names(tmp_path, "UCF101", split="train", val_fraction=0.4)
    assert sorted(held + rest) == files and held and not {n[:-7] for n in held} & {n[:-7] for n in rest}
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text("\n".join(name for name in files if "_g01_" in name))
    (lists / "trainlist01.txt").write_text(
        "\n".join(f"{name} 1" for name in [*files, "Archery/v_Archery_g99_c01.avi"] if "_g01_" not in name)
    )
    train = listed(tmp_path, "UCF101", split="train")
    assert len(train.videos) == 28 and train.missing == ["Archery/v_Archery_g99_c01.avi"] and train.classes == ["Archery", "Biking"]
    assert names(tmp_path, "UCF101", split="test") == [name for name in files if "_g01_" in name]
    held = names(tmp_path, "UCF101", split="val", val_fraction=0.4)
    rest = names(tmp_path, "UCF101", split="train", val_fraction=0.4)
    assert sorted(held + rest) == [video.name for video in train.videos], "a share is held out of the official train list"
    assert names(tmp_path, "UCF101", split="test", val_fraction=0.4) == names(tmp_path, "UCF101", split="test")
    for options, words in (
        ({"split": "val"}, "has test, train; --val-fraction holds out"),
        ({"split": "test", "fold": 3}, "testlist03.txt does not exist"),
        ({"split": "test", "split_lists": tmp_path / "no"}, "needs UCF-101's lists: no .*/no;"),
    ):
        with pytest.raises(UserError, match=words):
            listed(tmp_path, "UCF101", **options)


def test_ucf101_in_one_folder_has_classes_by_name(tmp_path: Path) -> None:
    files = [name.split("/")[1] for name in ucf(tmp_path / "x")]
    touch(tmp_path / "flat", files)
    (tmp_path / "flat" / "ucfTrainTestlist").mkdir()
    (tmp_path / "flat" / "ucfTrainTestlist" / "testlist01.txt").write_text("Biking/v_Biking_g03_c01.avi\n")
    found = listed(tmp_path / "flat", "UCF101", split="test")
    assert [(v.name, v.label, v.group) for v in found.videos] == [("v_Biking_g03_c01.avi", 1, "Biking/g03")]
    touch(tmp_path / "flat", ["odd.avi"])
    with pytest.raises(UserError, match=r"odd.avi is in no class folder .* try --dataset-name folder"):
        listed(tmp_path / "flat", "UCF101")


# Sets of frames


def test_sky_timelapse_in_one_and_two_levels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two = touch(tmp_path / "two", frames("sky_train/retrieval-1/clip_2", "sky_train/retrieval-1/clip_1", "sky_test/val-train/a", count=3))
    assert names(two, "SkyTimelapse", split="train") == ["sky_train/retrieval-1/clip_1", "sky_train/retrieval-1/clip_2"]
    assert names(two, "SkyTimelapse", split="test") == ["sky_test/val-train/a"], "a name with val or train in it stays where it is"
    assert [v.group for v in listed(two, "SkyTimelapse").videos] == ["val-train", "retrieval-1", "retrieval-1"]
    assert "taking the splits test (1), train (2) together" in caplog.text
    one = touch(tmp_path / "one", frames("train/07iAmXYqIfc_1", "train/07iAmXYqIfc_12", "val/short_1"))
    assert [(v.split, v.group) for v in listed(one, "SkyTimelapse").videos] == [
        ("train", "07iAmXYqIfc"), ("train", "07iAmXYqIfc"), ("val", "short_1"),
    ]  # fmt: skip
    assert names(one / "train", "SkyTimelapse") == ["07iAmXYqIfc_1", "07iAmXYqIfc_12"]


def test_taichi_in_folders_and_flat(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "x", [*frames("train/aB#1#20.mp4", "train/aB#30#60.mp4", "test/c"), "test/d_e_2.png", "test/d_e_10.png", "test/f_1.png"]
    )
    found = {video.name: video for video in listed(root, "TaiChi").videos}
    assert list(found) == ["test/c", "test/d_e", "test/f", "train/aB#1#20.mp4", "train/aB#30#60.mp4"]
    assert found["train/aB#1#20.mp4"].group == found["train/aB#30#60.mp4"].group == "aB"
    assert [path.relative_to(root).as_posix() for path in found["test/d_e"].frame_paths()] == ["test/d_e_2.png", "test/d_e_10.png"]
    assert (found["test/d_e"].content_id(), found["test/f"].content_id(), found["test/d_e"].split) == ([2], [1], "test")


# Sets of videos


def test_moving_mnist_reads_captions_where_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path / "mnist", ["1.mp4", "2.mp4", "10.mp4"])
    assert [v.caption for v in listed(root, "MovingMNIST").videos] == ["", "", ""]
    (root / "2.txt").write_text("beside")
    assert [v.caption for v in listed(root, "MovingMNIST").videos] == ["", "beside", ""]
    for file, text in (
        ("captions.txt", "1.mp4 digit 5 moves up\n10 left\n\n"),
        ("captions.csv", "video,caption\n1,digit 5 moves up\n10.mp4,left\n"),
        (
            "captions.json",
            '[{"path": "./1.mp4", "text": "digit 5 moves up"}, {"name": "10", "caption": "left"}, {"name": "gone", "caption": ""}]',
        ),
    ):
        (root / file).write_text(text)
        assert [v.caption for v in listed(root, "MovingMNIST").videos] == ["digit 5 moves up", "", "left"], file
    assert "1 captions of videos that are not there, 1 videos without a caption" in caplog.text
    (tmp_path / "own.tsv").write_text("file\ttext\n2.mp4\tother\n")
    found = listed(root, "MovingMNIST", captions=tmp_path / "own.tsv")
    assert ([v.caption for v in found.videos], found.classes) == (["", "other", ""], [])


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("c.json", "{", "is not JSON"),
        ("c.json", "[1]", "captions in JSON are"),
        ("c.json", '{"1.mp4": 3}', "entry 1: it needs a name"),
        ("c.json", '{"1.mp4": "\\ud800"}', "not UTF-8"),
        ("c.txt", "9.mp4 nothing", "no caption of a video in"),
        ("c.txt", "1.mp4 a\n1.mp4 b", "line 2: a second caption of 1.mp4"),
        ("c.txt", "1.mp4 " + "x" * 70000, "line 1: a caption of more than 64 KiB"),
        ("c.csv", "path\n1.mp4", "line 2: it needs a name"),
        ("x/1.txt", "x" * 70000, "1.txt: a caption of more than 64 KiB"),
        ("c.doc", "", "it should end in .txt"),
        ("no.txt", None, "cannot read"),
    ],
)
def test_captions_that_cannot_be_used_are_one_line(tmp_path: Path, file: str, text: str | None, words: str) -> None:
    root = touch(tmp_path / "x", ["1.mp4"])
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=words) as error:
        listed(root, "folder", captions=None if file == "x/1.txt" else tmp_path / file)
    assert "\n" not in str(error.value)


def test_clevrer_splits_by_folder_else_by_number(tmp_path: Path) -> None:
    flat = touch(tmp_path / "flat", [f"video_0{n // 1000}/video_{n:05d}.mp4" for n in (0, 9999, 10000, 14999, 15000, 19999)])
    assert [v.split for v in listed(flat, "CLEVRER").videos] == ["train", "train", "val", "val", "test", "test"]
    assert names(flat, "CLEVRER", split="val") == ["video_010/video_10000.mp4", "video_014/video_14999.mp4"]
    own = touch(tmp_path / "own", ["train_vid/video_12000.mp4", "a/val_vid/video_00001.mp4"])
    assert [(v.name, v.split) for v in listed(own, "CLEVRER").videos] == [
        ("a/val_vid/video_00001.mp4", "val"),
        ("train_vid/video_12000.mp4", "train"),
    ]
    touch(own, ["video_00001.mp4"])
    with pytest.raises(UserError, match=r"video_00001.mp4 is there twice: .*val_vid"):
        listed(own, "CLEVRER")


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


# Splits by share

videos = st.builds(
    lambda name, group: Video(Path(name), name, group=group and f"g{group}"), st.text("abcdef/", min_size=1, max_size=6), st.integers(0, 9)
)
some_videos = st.lists(videos, max_size=30, unique_by=lambda video: video.name)
shares = st.floats(0.01, 0.99)


@given(some_videos, shares, st.sampled_from(["", "train"]))
def test_a_split_by_share_is_a_partition_by_group(found: list[Video], share: float, official: str) -> None:
    found = [Video(v.path, v.name, group=v.group, split=official) for v in found]
    parts = {split: select(found, SourceOptions(split, val_fraction=share), Path("x")) for split in ("train", "val")} if found else {}
    assert sorted(v.name for part in parts.values() for v in part) == sorted(v.name for v in found)
    groups = [{v.split_group for v in part} for part in parts.values()]
    assert not groups or not groups[0] & groups[1]


@given(some_videos, some_videos, shares)
def test_adding_videos_moves_none(old: list[Video], new: list[Video], share: float) -> None:
    def val(found: list[Video]) -> set[str]:
        return {v.name for v in select(found, SourceOptions("val", val_fraction=share), Path("x"))} if found else set()

    both = old + [v for v in new if v.name not in {o.name for o in old}]
    assert val(both) & {v.name for v in old} == val(old)


@given(st.integers(1, 30), shares)
def test_spans_of_one_file_stay_together(count: int, share: float) -> None:
    spans = [Video(Path("a@b.mp4"), f"a@b.mp4@{number}-{number + 1}", span=(number, number + 1)) for number in range(count)]
    assert len({held_out(video, share) for video in [*spans, Video(Path("a@b.mp4"), "a@b.mp4")]}) == 1


@settings(max_examples=25)
@given(st.floats(0.05, 0.95))
def test_the_share_is_about_what_was_asked_for(share: float) -> None:
    held = sum(held_out(Video(Path("x"), f"{number}.mp4"), share) for number in range(2000))
    assert abs(held / 2000 - share) < 0.06


@given(st.lists(st.text("ab1029", max_size=5), max_size=8))
def test_natural_order_is_total_and_counts(texts: list[str]) -> None:
    texts.sort(key=natural_key)
    assert texts == sorted(set(texts), key=natural_key) or len(set(texts)) < len(texts)
    assert all(natural_key(one) != natural_key(two) for one in texts for two in texts if one != two)
    assert sorted(["a10", "a2", "a1b", "a"], key=natural_key) == ["a", "a1b", "a2", "a10"]


def test_class_numbers_keep_their_meaning() -> None:
    assert class_names(["3", "0"]) == ["0", "1", "2", "3"] and class_names(["b10", "b2", "b2"]) == ["b2", "b10"] and class_names([]) == []
    assert class_names(["3", "x"]) == ["3", "x"]
    with pytest.raises(UserError, match="above 65535"):
        class_names(["70000"])


def test_a_source_that_went_away_is_another_source(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", ["a/1.mp4", "b/1.png"])
    there = [Video(root / "a" / "1.mp4", "a/1.mp4"), Video(root / "b", "b", is_frames=True)]
    gone = [Video(root / "c" / "1.mp4", "a/1.mp4"), Video(root / "d", "b", is_frames=True)]
    assert [video.content_id() for video in there] == [[1], [1]] and [video.content_id() for video in gone] == [[], []]
