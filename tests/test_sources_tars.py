"""Tars of videos: what they say is checked byte by byte; they are not trusted."""

import io
import random
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.sources import list_videos
from datasets.sources.base import Listing, SourceOptions, Video
from datasets.sources.webdataset import MAX_HEADER_BYTES
from utils.errors import UserError


def listed(path: Path) -> Listing:
    """A listing in order of the names."""
    found = list_videos(path, "webdataset", SourceOptions(), seed=0)
    return Listing(sorted(found.videos, key=lambda video: video.name), found.classes, found.missing, found.rejected)


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
    found = listed(tmp_path)
    assert [(v.name, content(v), v.caption, v.label, v.split, v.group) for v in found.videos] == [
        ("test/0.tar/1.MP4", b"x" * 1000, "", 1, "test", ""),
        ("train/0.tar/1.mp4", b"one", "a dog", 7, "train", "u"),
        ("train/0.tar/2.webm", b"second", "two", 0, "train", ""),
        (f"train/0.tar/{long}", b"third", "", 7, "train", ""),
    ]
    assert found.classes == [str(number) for number in range(8)] and not found.rejected
    video = found.videos[0]
    assert video.content_id() == list(video.member or ()) and video.path == tmp_path / "test" / "0.tar"
    assert [v.name for v in listed(tmp_path / "test" / "0.tar").videos] == ["0.tar/1.MP4"]


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
    found = listed(tmp_path)
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
    found = listed(tmp_path)
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
    found = listed(tmp_path)
    assert [video.name for video in found.videos] == ["0.tar/1.mp4", "0.tar/2.mp4", "1.tar/1.mp4", "2.tar/1.mp4", "3.tar/1.mp4"]
    assert [(name, reason) for name, reason, _ in found.rejected] == [(f"{number}.tar", "damaged tar") for number in range(1, 6)]
    assert "after byte 1536" in found.rejected[0][2]
    with pytest.raises(UserError, match=r"holds no videos .*; 5.tar: damaged tar, after byte 0"):
        listed(tmp_path / "5.tar")


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
    found = listed(tmp_path)
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
        found = listed(root)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for video in found.videos:
            assert video.member is not None and sum(video.member) <= path.stat().st_size and video.member[1] > 0
    assert time.monotonic() - started < 5
