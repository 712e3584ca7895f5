"""Manifests: what they say is checked row by row; they are not trusted."""

import json
import math
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datasets.sources import list_videos
from datasets.sources.base import Listing, SourceOptions, Video
from utils.errors import UserError

ROWS = [
    {"path": "a.mp4", "start": 0, "end": 2.5, "caption": 'one, "quoted"', "label": "cat"},
    {"path": "./sub/../a.mp4", "start": 2.5, "end": None, "caption": "two\nlines", "label": "dog"},
    {"path": "sub/b.mp4", "start": None, "end": None, "caption": "", "label": "cat10"},
]


def listed(path: Path, name: str = "manifest", **options: object) -> Listing:
    """A listing in order of the names."""
    found = list_videos(path, name, SourceOptions(**options), seed=0)  # type: ignore[arg-type]
    return Listing(sorted(found.videos, key=lambda video: video.name), found.classes, found.missing, found.rejected)


def folder(root: Path) -> Path:
    (root / "sub").mkdir(exist_ok=True)
    (root / "frames").mkdir(exist_ok=True)
    for name in ("a.mp4", "sub/b.mp4", "frames/1.png"):
        (root / name).write_bytes(b"x")
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def manifests(root: Path) -> list[Path]:
    """The same rows in each format."""
    header = list(ROWS[0])
    quoted = [['"' + str("" if row[name] is None else row[name]).replace('"', '""') + '"' for name in header] for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), root / "m.parquet")
    return [
        write(root / "m.csv", "\ufeff" + "\r\n".join([",".join(header), *(",".join(row) for row in quoted)]) + "\r\n"),
        write(root / "m.tsv", "\n".join(["\t".join(header), *("\t".join(row) for row in quoted)])),
        write(root / "m.jsonl", "\n\n".join(json.dumps(row) for row in ROWS)),
        root / "m.parquet",
    ]


def test_all_formats_say_the_same(tmp_path: Path) -> None:
    found = [listed(path) for path in manifests(folder(tmp_path))]
    assert found[0].classes == ["cat", "cat10", "dog"] and not found[0].missing
    assert found[0].videos == [
        Video(tmp_path / "a.mp4", "a.mp4@0-2.5", 0, 'one, "quoted"', span=(0, 2.5), group="a.mp4"),
        Video(tmp_path / "a.mp4", "a.mp4@2.5-inf", 2, "two\nlines", span=(2.5, math.inf), group="a.mp4"),
        Video(tmp_path / "sub" / "b.mp4", "sub/b.mp4", 1, group="sub/b.mp4"),
    ]
    assert all(other == found[0] for other in found)


def test_a_path_alone_is_enough_and_the_rest_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = f"path,height,views\na.mp4,3,4\ngone.mp4,1,2\n{folder(tmp_path) / 'sub' / 'b.mp4'},1,2\n"
    found = listed(write(tmp_path / "m.csv", text))
    assert [video.name for video in found.videos] == [str(tmp_path / "sub" / "b.mp4"), "a.mp4"] and found.classes == []
    assert found.missing == ["gone.mp4"] and [record.message.split(": ")[1] for record in caplog.records] == [
        "ignoring the columns height, views"
    ]


def test_labels_splits_groups_and_frame_folders(tmp_path: Path) -> None:
    lines = [
        "path,label,split,group,fps,start",
        "a.mp4,3,train,r1,30,",
        "a.mp4,03,train,r1,,5",
        "frames,0,validation,r2,12.5,",
        "sub/b.mp4,1,val,r2,,",
    ]
    manifest = write(folder(tmp_path) / "m.csv", "\n".join([*lines, "gone.mp4,1,test,r3,,"]))
    found = listed(manifest)
    assert [(v.name, v.label, v.split, v.group, v.fps, v.is_frames) for v in found.videos] == [
        ("a.mp4", 3, "train", "r1", 0, False),
        ("a.mp4@5-inf", 3, "train", "r1", 0, False),
        ("frames", 0, "val", "r2", 12.5, True),
        ("sub/b.mp4", 1, "val", "r2", 0, False),
    ]
    assert found.classes == ["0", "1", "2", "3"] and found.missing == ["gone.mp4"]
    assert [v.name for v in listed(manifest, split="val").videos] == ["frames", "sub/b.mp4"] and listed(manifest, split="val").missing == []
    with pytest.raises(UserError, match=r"--split test: .* has train, val$"):
        listed(manifest, split="test")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"path": ""}, "line 2: no path"),
        ({"path": 3}, "line 2: path 3 is not text"),
        ({"path": "https://a/b.mp4"}, "have to be fetched first"),
        ({"path": "a\0"}, "is no path of a file"),
        ({"path": "\ud800"}, "is not text"),
        ({"start": "1:30"}, "start '1:30' is not a number of at least 0"),
        ({"start": -1}, "start -1 is not a number"),
        ({"end": True}, "end True is not a number"),
        ({"start": 2, "end": 2}, "start 2 is not before end 2"),
        ({"start": math.inf}, "start inf is not before end inf"),
        ({"path": "frames", "end": 3}, "it is a folder of frames"),
        ({"caption": ["x"]}, r"caption ['x'] is not text"),
        ({"caption": "x" * 70000}, "a caption of more than 64 KiB"),
        ({"label": -1}, "label -1 is below 0"),
        ({"label": 1.5}, "label 1.5 is not text"),
        ({"label": "9" * 5000}, "is above 65535"),
        ({"split": "dev"}, "split 'dev' is none of train, val, test"),
        ({"fps": math.inf}, "fps is not finite"),
        ({"path": "sub/b.mp4"}, "line 2: repeats line 1 (sub/b.mp4)"),
        ({"path": "sub/b.mp4", "start": 1, "split": "val"}, "sub/b.mp4 is in split val here and in (none) on line 1"),
        ({"label": "cat"}, "line 1: no label, other rows have one"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: dict[str, object], words: str) -> None:
    text = json.dumps({"path": "sub/b.mp4"}) + "\n" + json.dumps({"path": "a.mp4"} | row)
    with pytest.raises(UserError) as error:
        listed(write(folder(tmp_path) / "m.jsonl", text))
    assert words in str(error.value) and str(tmp_path / "m.jsonl") in str(error.value) and "\n" not in str(error.value)


def test_line_numbers_are_those_of_the_file_and_many_bad_rows_are_counted(tmp_path: Path) -> None:
    lines = ["path,start,caption", 'a.mp4,0,"two', 'lines"', "", *[f"a.mp4,x{number}," for number in range(9)]]
    with pytest.raises(UserError, match=r"m.csv line 5: start 'x0' .*; line 6: .*; and 4 more bad rows$"):
        listed(write(folder(tmp_path) / "m.csv", "\n".join(lines)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"path,path\na,b", "line 1: a column is there twice"),
        ("m.csv", b"path,end\na.mp4", "line 2: 1 fields, the header has 2"),
        ("m.csv", b'path\n"a.mp4', "unexpected end of data"),
        ("m.csv", b"path\n\xff", "is not UTF-8"),
        ("m.csv", b"", "holds no videos"),
        ("m.csv", b"file\na.mp4", "line 2: no path"),
        ("m.jsonl", b'{"path": "a.mp4"}\n[1]', "line 2: not a JSON object"),
        ("m.jsonl", b'\n{"path"', "line 2: not JSON"),
        ("m.jsonl", b"[" * 100000, "line 1: not JSON"),
        ("m.parquet", b"no", "is no Parquet file"),
        ("m.parquet", b"PAR1" + bytes(64) + b"PAR1", "is no Parquet file"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        listed(tmp_path / name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_its_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifests(folder(tmp_path))[3]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs the package pyarrow: pip install pyarrow, or save the table as CSV or JSONL"):
        listed(manifest)
