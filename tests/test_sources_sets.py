"""The layouts of known data sets: their splits, groups, classes and captions."""

from pathlib import Path

import pytest

from tests.source_trees import frames, listed, names, touch, ucf
from utils.errors import UserError

# UCF-101


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
