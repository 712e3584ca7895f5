"""preprocess.py inspect and verify: what a set holds is told and drawn; every kind of damage is found and named."""

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from datasets.prepare.check import check_set, read_set
from datasets.prepare.stored import decode_clip
from datasets.prepare.writer import Sample, ShardWriter, dump_json, shard_entry
from datasets.reader import ClipReader
from datasets.shards import FORMAT, SCHEMA, ShardSet, frame_sums
from datasets.sources.base import hash16
from tests.preprocessing import call, run
from tests.videos import write_tree

SHARD = "shard-00001.tar"


@pytest.fixture(scope="module", params=["npy", "mp4"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    videos = write_tree(root / "videos", [f"{name}/{i}.mp4" for name in ("cat", "dog") for i in range(2)], 16)
    (videos / "dog" / "1.txt").write_text("a dog that moves in waves")
    (videos / "dog" / "bad.mp4").write_bytes(b"no video")
    flags = ("--clip-length", 8, "--shard-size", 3, "--image-size", 16, 24, "--codec", request.param, "--licence", "CC0, of our own making")
    run(videos, "--out", root / "set", *flags, "--decoder", "pyav", "--name", "toy")
    return root / "set"


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "set"))


def faults(folder: Path) -> list[str]:
    """What verify lists; none when it says that the set is whole."""
    whole = "is whole" in (printed := _verify(folder))
    lines = printed.strip().splitlines()[:-1]
    assert whole == (not lines)
    return lines


def _verify(folder: Path) -> str:
    for code in (0, 1):
        try:
            return call("verify", folder, "--workers", 1, code=code)
        except AssertionError:
            if code:
                raise
    raise AssertionError


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(path: Path, place: int) -> None:
    def change(data: bytearray) -> None:
        data[place] ^= 4

    edit(path, change)


def sidecar(folder: Path, shard: str = SHARD) -> Path:
    return folder / shard.replace(".tar", ".index.json")


def seal(folder: Path, shard: str = SHARD) -> None:
    """Writes the hashes anew, as one would who wants damage to pass unseen."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        if entry["name"] == shard:
            data = (folder / shard).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            entry["index_sha256"] = hashlib.sha256(sidecar(folder, shard).read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def rewrite(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Replaces a member of a tar by one of the same size, and seals the set."""
    with tarfile.open(folder / SHARD) as tar:
        member = tar.getmember(name)
        old = tar.extractfile(member).read()  # type: ignore[union-attr]
    new = change(old)
    assert len(new) == len(old)
    edit(folder / SHARD, lambda data: data.__setitem__(slice(member.offset_data, member.offset_data + len(new)), new))
    seal(folder)


def test_a_whole_set_is_whole(shards: Path) -> None:
    assert faults(shards) == []
    assert "no fault" in call("verify", shards, "--workers", 2)


def test_a_flipped_byte_in_a_payload_names_the_sample(copy: Path) -> None:
    table = json.loads(sidecar(copy).read_text())
    flip(copy / SHARD, table["offset"][1] + table["nbytes"][1] // 2)
    found = faults(copy)
    assert len(found) == 2 and "sha256" in found[0] and found[1] == f"{SHARD} sample {table['key'][1]}: its bytes are damaged (crc32)"


def test_a_flipped_byte_in_a_header_names_the_sample(copy: Path) -> None:
    table = json.loads(sidecar(copy).read_text())
    flip(copy / SHARD, table["offset"][1] - 512 + 3)
    found = faults(copy)
    assert len(found) == 2 and f"sample {table['key'][1]}: the tar header at byte" in found[1]


def test_a_flipped_byte_in_the_padding_is_found(copy: Path) -> None:
    flip(copy / SHARD, (copy / SHARD).stat().st_size - 1)
    assert any("sha256" in line for line in faults(copy))


def test_every_flipped_byte_is_found(copy: Path) -> None:
    rng, size, index = np.random.default_rng(0), (copy / SHARD).stat().st_size, read_set(copy)
    index["shards"] = [entry for entry in index["shards"] if entry["name"] == SHARD]
    index["samples"] = index["shards"][0]["samples"]
    assert not any(found.faults for found in check_set(copy, index, 1))
    for place in rng.integers(0, size, 60).tolist():
        flip(copy / SHARD, place)
        assert any(found.faults for found in check_set(copy, index, 1)), place
        flip(copy / SHARD, place)


def test_a_truncated_tar_names_what_is_gone(copy: Path) -> None:
    table = json.loads(sidecar(copy).read_text())
    edit(copy / SHARD, lambda data: data.__delitem__(slice(table["offset"][1] + 10, None)))
    found = faults(copy)
    assert "bytes, index.json says" in found[0]
    assert [line.split(" sample ")[1].split(":")[0] for line in found[1:]] == table["key"][1:]


def test_a_missing_shard_and_a_missing_index(copy: Path) -> None:
    (copy / SHARD).unlink()
    sidecar(copy, "shard-00000.tar").unlink()
    assert faults(copy) == [
        "shard-00000.tar: its shard-00000.index.json cannot be read: No such file or directory",
        f"{SHARD}: it is missing",
    ]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("label", 1, "the offset index label 1 ('dog')"),
        ("crc32", 7, "damaged (crc32)"),
        ("frames", 9, "is damaged: frames from"),
        ("offset", 1024, "its offset index says"),
        ("key", "0123456789abcdef_000000", "is not at byte"),
    ],
)
def test_an_edited_offset_index_is_found_even_with_new_hashes(copy: Path, column: str, value: object, words: str) -> None:
    table = json.loads(sidecar(copy).read_text())
    row = table["label"].index(0)
    table[column][row] = value
    sidecar(copy).write_bytes(dump_json(table))
    assert any("the sha256 of its shard-00001.index.json" in line for line in faults(copy))
    seal(copy)
    found = faults(copy)
    assert found and all("sha256" not in line for line in found) and words in "".join(found), found


def member_names(folder: Path) -> list[str]:
    with tarfile.open(folder / SHARD) as tar:
        return tar.getnames()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"class":"dog"', b'"class":"cat"', "its card says class 'cat'"),
        (b'"source":"dog/', b'"source":"dig/', "its card is of another clip: 'dig/"),
        (b'"span":[', b'"spam":[', "its card, cls or txt is damaged"),
        (b"{", b"[", "its card, cls or txt is damaged"),
    ],
)
def test_a_wrong_card_is_found(copy: Path, old: bytes, new: bytes, words: str) -> None:
    with tarfile.open(copy / SHARD) as tar:
        cards = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".json")}  # type: ignore[union-attr]
    name = next(name for name, card in cards.items() if b'"class":"dog"' in card)
    rewrite(copy, name, lambda card: card.replace(old, new, 1))
    found = faults(copy)
    assert len(found) == 1 and words in found[0] and found[0].startswith(f"{SHARD} sample {name.split('.')[0]}:")


def test_a_wrong_label_is_found(copy: Path) -> None:
    rewrite(copy, next(name for name in member_names(copy) if name.endswith(".cls")), lambda label: str(1 - int(label)).encode())
    assert "its cls" in faults(copy)[0]


def test_a_sample_that_does_not_decode_is_found_even_with_new_checksums(copy: Path) -> None:
    table = json.loads(sidecar(copy).read_text())
    start, size = table["offset"][0], table["nbytes"][0]
    edit(copy / SHARD, lambda data: data.__setitem__(slice(start, start + size), bytes(size)))
    table["crc32"][0] = zlib.crc32(bytes(size))
    sidecar(copy).write_bytes(dump_json(table))
    seal(copy)
    found = faults(copy)
    assert len(found) == 1 and "it does not decode" in found[0]


def test_a_key_that_comes_twice_is_found(copy: Path) -> None:
    index = json.loads((copy / "index.json").read_text())
    again = index["shards"][0] | {"name": "shard-00009.tar"}
    for suffix in (".tar", ".index.json"):
        shutil.copy(copy / f"shard-00000{suffix}", copy / f"shard-00009{suffix}")
    index["shards"].append(again)
    (copy / "index.json").write_text(json.dumps(index))
    found = faults(copy)
    assert len([line for line in found if "its key stands in the set before" in line and line.startswith("shard-00009")]) == 3
    assert any("index.json: it says" in line for line in found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(schema=99), "has shard schema 99"),
        (lambda index: index["shards"][0].update(name="../x.tar"), "is not a plain file name"),
        (lambda index: index["shards"][0].update(bytes=-1), "is damaged"),
        (lambda index: index.pop("codec"), "codec"),
        (lambda index: index.update(dropped={"shard-00000.tar": [99]}), "rows to leave out"),
    ],
)
def test_a_wrong_index_is_one_line(copy: Path, change: Callable[[dict[str, object]], object], words: str) -> None:
    index = json.loads((copy / "index.json").read_text())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    assert words in call("verify", copy, "--workers", 1, code=1)


def test_no_set_is_one_line(tmp_path: Path) -> None:
    for name in ("verify", "inspect"):
        said = call(name, tmp_path / "nowhere", code=1)
        assert len(said.splitlines()) == 1 and "does not exist" in said
        assert "is no folder of this machine" in call(name, "s3://bucket/set", code=2)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / SHARD).touch()
    assert "unfinished shard set" in call("verify", tmp_path / "half", code=1)


def test_inspect_prints_the_report(shards: Path) -> None:
    printed = call("inspect", shards)
    for words in (
        "toy, layout folder",
        "CC0, of our own making",
        "8 samples of 8 frames, 16x24 at 25 fps",
        "2 classes, 4 videos",
        "bad.mp4",
    ):
        assert words in printed, printed
    assert "frame rate of a source\n  25" in printed and "clips of a video\n  2" in printed


def test_inspect_needs_no_report(copy: Path) -> None:
    (copy / "report.json").unlink()
    printed = call("inspect", copy)
    assert "there is no report.json" in printed and "clips of a class\n  cat " in printed and "motion of a clip" in printed, printed
    (copy / "report.json").write_text("{")
    assert "report.json is damaged" in call("inspect", copy, code=1)


def test_pictures_are_first_frames_the_classes_in_turn(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    assert "first frames" in call("inspect", copy, "--pictures", out, "--num-pictures", "5")
    shards = ShardSet.open(copy)
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{place:06d}-class{place % 2:03d}.png" for place in range(5)], "two classes, in turn"
    reader = ClipReader(shards, 8)
    for place, name in enumerate(names):
        sample = np.flatnonzero(shards.label == place % 2)[place // 2]
        with Image.open(out / name) as image:
            assert np.array_equal(np.asarray(image), reader.read(np.array([sample]), np.array([0]))[0, 0])
    assert "cannot draw" in call("inspect", copy, "--pictures", "/proc/x", code=1)


def test_the_sheet_shows_the_clips(copy: Path, tmp_path: Path) -> None:
    call("inspect", copy, "--sheet", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == (copy / "sheet.png").read_bytes()
    with Image.open(copy / "sheet.png") as image:
        pixels = np.asarray(image)
    strips = (pixels.std(axis=(1, 2)) > 30).mean()
    assert pixels.shape[2] == 3 and strips > 0.5, "most rows of the sheet show pictures"
    assert "cannot draw" in call("inspect", copy, "--sheet", "/proc/x.png", code=1)
    (copy / SHARD).write_bytes(b"")
    assert "damaged" in call("inspect", copy, "--sheet", tmp_path / "x.png", code=1) and not (tmp_path / "x.png").exists()


def latent_set(folder: Path, value: float) -> Path:
    """One shard of one sample of latents."""
    folder.mkdir()
    tensors = {"a": np.full((2, 3), value, np.float16), "b": np.arange(4, dtype=np.float16)}
    payload = save(tensors)
    block = np.frombuffer(payload, np.uint8)[-20:].reshape(1, -1).copy()
    card = {"source": "x.mp4", "span": [0, 8], "class": None, "caption": None, "padded_frames": 0}
    sums = frame_sums(block).astype(">u8").tobytes().hex()
    shard = ShardWriter(folder, "shard-00000.tar")
    shard.add(Sample(f"{hash16('x.mp4')}_000000", {"safetensors": payload, "json": dump_json(card)}, 1, 0, sums))
    entry = shard_entry(folder, "shard-00000.tar", shard.close({}))
    index = {"format": FORMAT, "schema": SCHEMA, "name": "latents", "source": "folder", "licence": "", "split": "all", "classes": []}
    index |= {"clip_length": 8, "fps": 8.0, "size": [16, 16], "samples": 1, "videos": 1, "shards": [entry]}
    index |= {"codec": {"name": "latent", "dtype": "float16"}, "tensors": {"a": [2, 3], "b": [4]}, "autoencoder": {"sha256": "f" * 64}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_latents_are_checked_and_described(tmp_path: Path) -> None:
    folder = latent_set(tmp_path / "good", 1)
    assert faults(folder) == []
    printed = call("inspect", folder)
    assert "latent float16" in printed and "a [2, 3], b [4]" in printed
    assert "no pictures" in call("inspect", folder, "--sheet", tmp_path / "x.png", code=2)
    flip(folder / "shard-00000.tar", 512 + json.loads((folder / "shard-00000.index.json").read_text())["nbytes"][0] - 1)
    assert any("crc32" in line for line in faults(folder))
    assert "a is not finite" in faults(latent_set(tmp_path / "bad", np.nan))[0]
    other = latent_set(tmp_path / "other", 1)
    edit(other / "index.json", lambda data: data.__setitem__(slice(None), bytes(data).replace(b'"a": [2, 3]', b'"a": [3, 2]')))
    assert "tensors" in faults(other)[0]


def npy(header: dict[str, object], data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "EOF"),
        (b"PK\x03\x04 a zip", "magic"),
        (npy({"descr": "|O", "fortran_order": False, "shape": (1, 2, 2, 3)}, bytes(12)), "object of shape"),
        (npy({"descr": "|u1", "fortran_order": True, "shape": (1, 2, 2, 3)}, bytes(12)), "uint8 of shape"),
        (npy({"descr": "|u1", "fortran_order": False, "shape": (1, 1 << 40, 1 << 40, 3)}, bytes(12)), "12 bytes for shape"),
        (npy({"descr": "|u1", "fortran_order": False, "shape": (1, -2, -2, 3)}, bytes(12)), "12 bytes for shape"),
    ],
)
def test_only_plain_clips_are_opened(payload: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_clip(payload, "npy", 1)
