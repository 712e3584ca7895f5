"""Sources that are files: manifests and tars. What they say is checked row by row and byte by byte; they are not trusted."""

import io
import json
import math
import random
import sys
import tarfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.sources import list_videos
from datasets.sources.base import Listing, SourceOptions, Video
from datasets.sources.webdataset import MAX_HEADER_BYTES
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


# Tars


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def content(video: Video) -> bytes:
    assert video.member is not None
    return video.path.read_bytes()[video.member[0] :][: video.member[1]]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_videos_are_listed_by_offset(tmp_path: Path, form: int) -> None:
    long = "d/" * (20 if form == tarfile.USTAR_FORMAT else 100) + "3.mp4"
    first = {
        "1.mp4": b"one",
        "1.txt": b" a dog \n",
        "1.json": b'{"url": "u", "caption": "other"}',
        "1.cls": b"07",
        "2.json": b'{"caption": "two"}',
    }
    write_tar(tmp_path / "train" / "0.tar", first | {"2.webm": b"second", "2.cls": b"0", long: b"third", long[:-3] + "cls": b"7"}, form)
    write_tar(tmp_path / "test" / "0.tar", {"1.MP4": b"x" * 1000, "1.cls": b"1", "1.source.json": b"?", "readme": b"?"}, form)
    found = listed(tmp_path, "webdataset")
    assert [(v.name, content(v), v.caption, v.label, v.split, v.group) for v in found.videos] == [
        ("test/0.tar/1.MP4", b"x" * 1000, "", 1, "test", ""),
        ("train/0.tar/1.mp4", b"one", "a dog", 7, "train", "u"),
        ("train/0.tar/2.webm", b"second", "two", 0, "train", ""),
        (f"train/0.tar/{long}", b"third", "", 7, "train", ""),
    ]
    assert found.classes == [str(number) for number in range(8)] and not found.rejected
    video = found.videos[0]
    assert video.content_id() == list(video.member or ()) and video.path == tmp_path / "test" / "0.tar"
    assert [v.name for v in listed(tmp_path / "test" / "0.tar", "webdataset").videos] == ["0.tar/1.MP4"]


def test_what_cannot_be_used_is_rejected_by_name(tmp_path: Path) -> None:
    big = b"x" * (1 << 17)
    members = {
        "good.mp4": b"v", "good.cls": b"cat", "empty.mp4": b"", "empty.cls": b"cat", "text.txt": b"t",
        "noclass.mp4": b"v",
        "json.mp4": b"v", "json.json": b"[" * 100000, "json.cls": b"cat",
        "long.mp4": b"v", "long.txt": big, "utf.mp4": b"v", "utf.txt": b"\xff",
    }  # fmt: skip
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("good.mp4"), io.BytesIO())
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"link{ord(kind)}.mp4")
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
    found = listed(tmp_path, "webdataset")
    assert [video.name for video in found.videos] == ["0.tar/good.mp4"] and found.classes == ["cat"]
    assert sorted((name, reason) for name, reason, _ in found.rejected) == [
        ("0.tar/empty", "empty video"),
        ("0.tar/good.mp4", "duplicate key"),
        ("0.tar/json", "damaged json"),
        ("0.tar/long", "text too large"),
        ("0.tar/noclass.mp4", "no class"),
        ("0.tar/text", "no video in the sample"),
        ("0.tar/utf", "damaged caption"),
    ]


def test_names_are_never_paths_and_are_safe_to_print(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"../../../etc/x.mp4": b"1", "/abs.mp4": b"2", "a\n\x1b[31m.mp4": b"3", "\udcff.mp4": b"4"})
    found = listed(tmp_path, "webdataset")
    assert {video.path for video in found.videos} == {tmp_path / "0.tar"} and len({video.key for video in found.videos}) == 4
    assert sorted(content(video) for video in found.videos) == [b"1", b"2", b"3", b"4"]
    assert all(video.name.isprintable() for video in found.videos)


def test_damaged_tars_give_what_comes_before_the_damage(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "0.tar", {"1.mp4": b"1" * 600, "2.mp4": b"2" * 600}, tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: 1536 + 512 + 100])
    (tmp_path / "2.tar").write_bytes(whole[:1536])
    (tmp_path / "3.tar").write_bytes(whole[:1536] + b"junk" * 128 + whole[2048:])
    (tmp_path / "4.tar").write_bytes(b"")
    (tmp_path / "5.tar").write_bytes(b"no tar at all" * 100)
    found = listed(tmp_path, "webdataset")
    assert [video.name for video in found.videos] == ["0.tar/1.mp4", "0.tar/2.mp4", "1.tar/1.mp4", "2.tar/1.mp4", "3.tar/1.mp4"]
    assert [(name, reason) for name, reason, _ in found.rejected] == [(f"{number}.tar", "damaged tar") for number in range(1, 6)]
    assert "after byte 1536" in found.rejected[0][2]
    with pytest.raises(UserError, match=r"holds no videos .*; 5.tar: damaged tar, after byte 0"):
        listed(tmp_path / "5.tar", "webdataset")


def test_headers_that_lie_about_sizes_end_the_tar(tmp_path: Path) -> None:
    def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    for number, lie in enumerate(
        [
            header("x.mp4", 1 << 40),
            header("x.mp4", -(1 << 20)),
            header("x", MAX_HEADER_BYTES * 8, tarfile.XHDTYPE),
            header("x", -512, tarfile.XHDTYPE),
        ]
        + [header("x", 1 << 50, tarfile.GNUTYPE_LONGNAME), header("x", 0, tarfile.XHDTYPE) * 3000]
    ):
        write_tar(tmp_path / f"{number}.tar", {"good.mp4": b"v"}, tarfile.USTAR_FORMAT)
        blob = (tmp_path / f"{number}.tar").read_bytes()[:1024]
        (tmp_path / f"{number}.tar").write_bytes(blob + lie + bytes(10240))
    found = listed(tmp_path, "webdataset")
    assert len(found.videos) == 6 and [reason for _, reason, _ in found.rejected] == ["damaged tar"] * 6


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_flipped_bytes_never_crash_and_never_reach_outside_the_tar(tmp_path_factory: pytest.TempPathFactory, seed: int, form: int) -> None:
    rng = random.Random(seed)
    root = tmp_path_factory.mktemp("fuzz")
    members = {f"{'d' * (120 if form != tarfile.USTAR_FORMAT else 9)}{n}.{e}": b"{}" for n in range(3) for e in ("mp4", "json", "txt")}
    path = write_tar(root / "0.tar", members, form)
    blob = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 30)):
        blob[rng.randrange(len(blob))] = rng.randrange(256)
    path.write_bytes(blob[: rng.choice([len(blob), rng.randrange(len(blob))])])
    started = time.monotonic()
    try:
        found = listed(root, "webdataset")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for video in found.videos:
            assert video.member is not None and sum(video.member) <= path.stat().st_size and video.member[1] > 0
    assert time.monotonic() - started < 5
