"""Condition vectors: from files beside videos or a manifest's column, through shards and latents, checked at every step."""

import io
import json
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.conditions import CondFormat
from datasets.npy import npy_array
from datasets.prepare.latents import Share, encode_set
from datasets.shards import ShardSet
from datasets.sources import list_videos
from datasets.sources.base import SourceOptions
from datasets.tables import read_table
from tests.frame_encoders import frame_job
from tests.latent_sets import rows
from tests.preprocessing import call, report, run
from tests.source_trees import touch
from tests.videos import folder_digests, write_tree
from utils.errors import UserError

VIDEOS = ("a.mp4", "sub/b.mp4", "sub/c.d.mp4")
FLAGS = ("--image-size", 8, 12, "--clip-length", 8)


def vector(number: int, dtype: str = "float16", shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(shape).astype(dtype)


def beside(root: Path, **settings: Any) -> Path:
    """Each video with its vector."""
    for number, name in enumerate(VIDEOS):
        np.save(root / (name.removesuffix(".mp4") + ".emb.npy"), vector(number, **settings))
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside(write_tree(tmp_path_factory.mktemp("in") / "in", VIDEOS, frames=16))


@pytest.fixture(scope="module")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of three videos in two shards."""
    out = tmp_path_factory.mktemp("shards") / "set"
    run(videos, "--out", out, *FLAGS, "--shard-size", 4)
    return out


def stored(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(source, vector) of each sample, read without the code under test."""
    index, found = json.loads((folder / "index.json").read_bytes()), []
    for entry in index["shards"]:
        raw = (folder / entry["name"]).read_bytes()
        table = json.loads((folder / entry["name"].replace(".tar", ".index.json")).read_bytes())
        for offset, crc in zip(table["cond_offset"], table["cond_crc32"], strict=True):
            member = raw[offset : offset + index["cond_nbytes"]]
            assert zlib.crc32(member) == crc
            data = np.frombuffer(member[-index["cond_dim"] * np.dtype(index["cond_dtype"]).itemsize :], index["cond_dtype"])
            found.append(np.load(io.BytesIO(member), allow_pickle=False))
            assert np.array_equal(data.reshape(index["cond_shape"]), found[-1])
    return list(zip([json.loads(members["json"])["source"] for _, members in rows(folder)], found, strict=True))


def test_vectors_stand_beside_every_clip(videos: Path, shards: Path) -> None:
    index = json.loads((shards / "index.json").read_bytes())
    assert {name: index[name] for name in index if name.startswith("cond")} == {
        "cond_shape": [3, 5], "cond_dtype": "float16", "cond_dim": 15, "cond_nbytes": 128 + 30,
    }  # fmt: skip
    found = stored(shards)
    assert len(found) == 6 and {source for source, _ in found} == set(VIDEOS)
    assert all(np.array_equal(value, vector(VIDEOS.index(source))) for source, value in found)
    assert list(next(rows(shards))[1]) == ["npy", "json", "emb.npy"]
    assert "no fault" in call("verify", shards, "--workers", 1) and "condition vectors: float16 3x5" in call("inspect", shards)


def test_latents_carry_them(shards: Path, tmp_path: Path) -> None:
    index = encode_set(frame_job(shards, tmp_path / "set"), Share(), lambda samples: None)
    assert index is not None and index["cond_shape"] == [3, 5]
    for (source, value), (own, before) in zip(stored(tmp_path / "set"), stored(shards), strict=True):
        assert source == own and np.array_equal(value, before)
    assert "no fault" in call("verify", tmp_path / "set", "--workers", 1)


def test_a_manifest_names_them(videos: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vector(7, "float32"))
    np.save(tmp_path / "y.npy", np.asfortranarray(vector(8, ">f4")))
    lines = [f"{videos / 'a.mp4'},0,0.3,x.npy", f"{videos / 'a.mp4'},0.3,,y.npy"]
    (tmp_path / "m.csv").write_text("\n".join(["path,start,end,embedding", *lines]))
    run(tmp_path / "m.csv", "--out", tmp_path / "set", "--image-size", 8, 8, "--clip-length", 4)
    found = stored(tmp_path / "set")
    assert {source.rpartition("@")[2] for source, _ in found} == {"0-0.3", "0.3-inf"}
    assert all(np.array_equal(value, vector(7 if source.endswith("0-0.3") else 8, "float32")) for source, value in found)
    assert "no fault" in call("verify", tmp_path / "set", "--workers", 1)
    (tmp_path / "m.csv").write_text(f"path,embedding\n{videos / 'a.mp4'},gone.npy\n")
    with pytest.raises(UserError, match=r"line 2: there is no embedding gone.npy"):
        list_videos(tmp_path / "m.csv", "manifest", SourceOptions(), 0)


def test_folders_of_frames_and_pictures_have_them_too(tmp_path: Path) -> None:
    root = touch(tmp_path / "frames", ["walk/1.png", "run/1.png"])
    for number, name in enumerate(("walk", "run", "walk/1", "run/1")):
        np.save(root / f"{name}.emb.npy", vector(number))
    for layout, wanted in (("frames", {"walk": "walk", "run": "run"}), ("images", {"walk/1.png": "walk/1", "run/1.png": "run/1"})):
        found = list_videos(root, layout, SourceOptions(), 0).videos
        paths = {video.name: video.embedding and video.embedding.path for video in found}
        assert paths == {name: root / f"{stem}.emb.npy" for name, stem in wanted.items()}, layout


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


BAD: dict[str, tuple[Any, str]] = {
    "missing": (Path.unlink, r"1 of 3 videos have no emb.npy, sub/b.mp4 is one: give each of them one, or none"),
    "shape": (lambda path: np.save(path, vector(1, shape=(5, 3))), r"is float16 5x3, .* is float16 3x5: all condition vectors of a set"),
    "type": (lambda path: np.save(path, vector(1, "float32")), r"is float32 3x5, .* is float16 3x5|is float16 3x5, .* is float32 3x5"),
    "double": (
        lambda path: np.save(path, vector(1, "float64")),
        r"is no condition vector: float64 numbers; save them as float16",
    ),
    "scalar": (lambda path: np.save(path, np.float16(1)), r"is no condition vector: shape \(\)"),
    "empty": (lambda path: np.save(path, np.zeros((0, 5), "float16")), r"is no condition vector: shape \(0, 5\)"),
    "pickle": (pickled, r"is no condition vector: object numbers"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps([1.0])), r"b.emb.npy is no condition vector: .*magic"),
}


@pytest.mark.parametrize("case", BAD)
def test_vectors_that_are_not_alike_are_one_line(case: str, videos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(videos, tmp_path / "in")
    spoil, words = BAD[case]
    spoil(root / "sub" / "b.emb.npy")
    with pytest.raises(UserError, match=words) as caught:
        list_videos(root, "folder", SourceOptions(), 0)
    assert "\n" not in str(caught.value)


def test_vectors_with_damaged_numbers_leave_their_video_out(videos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(videos, tmp_path / "in")
    np.save(root / "a.emb.npy", np.full((3, 5), np.nan, np.float16))
    raw = (root / "sub" / "b.emb.npy").read_bytes()
    (root / "sub" / "b.emb.npy").write_bytes(raw[:-2])
    run(root, "--out", tmp_path / "set", *FLAGS)
    details = {row["file"]: row["detail"] for row in report(tmp_path / "set")["skipped"]["condition vector"]}  # type: ignore[index]
    assert "not all numbers are finite" in details["a.mp4"] and "28 bytes for float16" in details["sub/b.mp4"]
    assert {source for source, _ in stored(tmp_path / "set")} == {"sub/c.d.mp4"}


def test_other_vectors_make_another_set(videos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(videos, tmp_path / "in")
    run(root, "--out", tmp_path / "set", *FLAGS)
    assert "complete already" in run(root, "--out", tmp_path / "set", *FLAGS)
    np.save(root / "a.emb.npy", vector(9))
    assert "made of other videos" in run(root, "--out", tmp_path / "set", *FLAGS, code=1)
    for path in root.rglob("*.emb.npy"):
        path.unlink()
    assert "made of other videos" in run(root, "--out", tmp_path / "set", *FLAGS, code=1)
    run(root, "--out", tmp_path / "without", *FLAGS)
    assert not any(name.startswith("cond") for name in json.loads((tmp_path / "without" / "index.json").read_bytes()))


def test_the_bytes_do_not_depend_on_workers(videos: Path, shards: Path, tmp_path: Path) -> None:
    call("shards", videos, "--out", tmp_path / "set", *FLAGS, "--shard-size", 4, "--workers", 2)
    assert folder_digests(tmp_path / "set") == folder_digests(shards)


def test_every_flipped_byte_of_a_vector_is_found(shards: Path, tmp_path: Path) -> None:
    table = json.loads((shards / "shard-00000.index.json").read_bytes())
    for place in (0, 20, 127, 128, 157):
        copy = shutil.copytree(shards, tmp_path / str(place))
        raw = bytearray((copy / "shard-00000.tar").read_bytes())
        raw[table["cond_offset"][1] + place] ^= 4
        (copy / "shard-00000.tar").write_bytes(raw)
        assert "its condition vector is damaged (crc32)" in call("verify", copy, "--workers", 1, code=1)


@pytest.mark.parametrize(
    "change",
    [
        {"cond_dim": 14},
        {"cond_nbytes": 30},
        {"cond_nbytes": 1 << 20},
        {"cond_dtype": "float64"},
        {"cond_dtype": "object"},
        {"cond_shape": [3.0, 5]},
        {"cond_shape": []},
        {"cond_shape": [-3, -5]},
        {"cond_shape": [1 << 20, 1 << 20], "cond_dim": 1 << 40},
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused(change: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_bytes())
    (copy / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=r"index.json is damaged"):
        ShardSet.open(copy)


@pytest.mark.parametrize(
    "change", [{"cond_offset": [1 << 40] * 4}, {"cond_offset": [100] * 4}, {"cond_crc32": [-1] * 4}, {"cond_crc32": [1]}]
)
def test_offsets_of_vectors_are_within_the_tar(change: dict[str, Any], shards: Path) -> None:
    index = json.loads((shards / "index.json").read_bytes())
    table = json.loads((shards / "shard-00000.index.json").read_bytes())
    assert read_table(json.dumps(table).encode(), index, index["shards"][0]).columns["cond_crc32"].dtype == np.uint32
    with pytest.raises(ValueError, match=r"cond|column"):
        read_table(json.dumps(table | change).encode(), index, index["shards"][0])


def test_arrays_are_read_without_pickles() -> None:
    for array in (vector(0), np.asfortranarray(vector(1, "float32")), vector(2, ">f4")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert np.array_equal(npy_array(buffer.getvalue()), array)
        form = CondFormat((3, 5), array.dtype.name)
        assert np.array_equal(np.load(io.BytesIO(form.member(buffer.getvalue())), allow_pickle=False), array)
        with pytest.raises(ValueError, match="bytes for"):
            npy_array(buffer.getvalue() + b"x")
