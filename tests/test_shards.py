"""Opening a shard set: the same from a folder, a URL and a command; what an index may not say; what is wrong is told or skipped."""

import functools
import hashlib
import io
import json
import pickle
import random
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from datasets.shards import FORMAT, SCHEMA, ShardSet, frame_sums, sidecar_name
from datasets.storage import CacheConfig
from datasets.tables import COLUMNS as COLUMN_TYPES
from datasets.tables import Keys, Table, join, repeated
from utils.errors import ConfigError, UserError

SHARDS, ROWS, FRAMES, SIDE = 3, 4, 2, 8
Spoil = Callable[[Path], None]


def write_shard(folder: Path, number: int) -> dict[str, Any]:
    """One shard of raw clips with its offset index. Returns its row of index.json."""
    path, rng = folder / f"shard-{number:05d}.tar", np.random.default_rng(number)
    table: dict[str, list[Any]] = {name: [] for name in ("key", "offset", "nbytes", "crc32", "frames", "label", "sums")}
    with tarfile.open(path, "w") as tar:
        for row in range(ROWS):
            frames, buffer = rng.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8), io.BytesIO()
            np.save(buffer, frames)
            payload, info = buffer.getvalue(), tarfile.TarInfo(f"clip{number}_{row}.npy")
            info.size = len(payload)
            sums = frame_sums(frames.reshape(FRAMES, -1)).astype(">u8").tobytes().hex()
            offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
            values = (f"clip{number}_{row}", offset, len(payload), crc32(payload), FRAMES, row % 2, sums)
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
            tar.addfile(info, io.BytesIO(payload))
    sidecar = folder / sidecar_name(path.name)
    sidecar.write_text(json.dumps(table))
    digests = {"sha256": hashlib.sha256(path.read_bytes()), "index_sha256": hashlib.sha256(sidecar.read_bytes())}
    return {"name": path.name, "samples": ROWS, "bytes": path.stat().st_size} | {name: sha.hexdigest() for name, sha in digests.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    index = {
        "format": FORMAT, "schema": SCHEMA, "name": "toy", "classes": ["a", "b"], "clip_length": FRAMES, "fps": 25.0, "size": [SIDE, SIDE],
        "codec": {"name": "npy"}, "shards": [write_shard(folder, number) for number in range(SHARDS)], "dropped": {},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(str(tmp_path / "cache"), fetch_timeout=10, fetch_retries=0)


COLUMNS = ("shard", "offset", "nbytes", "crc32", "frames", "label", "sums", "first_sum")


def test_the_set_is_the_same_from_everywhere(folder: Path, url: str, cache: CacheConfig) -> None:
    local = ShardSet.open(folder)
    assert (local.num_samples, local.clip_length, local.size, local.is_remote) == (12, 2, (8, 8), False)
    assert local.keys == [f"clip{number}_{row}" for number in range(SHARDS) for row in range(ROWS)]
    for location in (url, f"pipe:cat {folder}/{{}}", f"file:{folder}"):
        shards = ShardSet.open(location, cache=cache)
        assert shards.keys == local.keys and shards.digest == local.digest
        assert all(np.array_equal(getattr(shards, name), getattr(local, name)) for name in COLUMNS)
        for shard in range(SHARDS):
            assert shards.shard_file(shard).read_bytes() == local.shard_file(shard).read_bytes()
        assert shards.is_remote == (not location.startswith("file"))
        assert shards.describe(5).endswith("shard-00001.tar sample clip1_1")
        assert pickle.loads(pickle.dumps(shards)).keys == local.keys


def test_rows_point_at_their_clips(folder: Path) -> None:
    shards = ShardSet.open(folder)
    for sample in range(shards.num_samples):
        data = shards.shard_path(sample).read_bytes()[int(shards.offset[sample]) :][: int(shards.nbytes[sample])]
        sums = frame_sums(np.load(io.BytesIO(data)).reshape(FRAMES, -1))
        first = int(shards.first_sum[sample])
        assert crc32(data) == shards.crc32[sample] and np.array_equal(sums, shards.sums[first : first + FRAMES])


def test_a_missing_remote_set_and_a_small_cache_are_refused(url: str, cache: CacheConfig) -> None:
    with pytest.raises(UserError, match=r"none/index.json: HTTP 404"):
        ShardSet.open(url + "none", cache=cache)
    largest = ShardSet.open(url, cache=cache).largest_shard
    shards = ShardSet.open(url, cache=CacheConfig(cache.cache_dir, cache_gib=2.5 * largest / 2**30))
    shards.check_cache(2)
    with pytest.raises(ConfigError, match=r"reading from 3 shards at a time of http.*--cache-gib 1 or more"):
        shards.check_cache(3)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def edit_table(folder: Path, change: Callable[[dict[str, Any]], object], shard: int = 1) -> None:
    """Changes an offset index as one who wants to deceive would: the hash in index.json is made to fit."""
    path = folder / f"shard-{shard:05d}.index.json"
    table = json.loads(path.read_bytes())
    change(table)
    path.write_text(json.dumps(table))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_index(folder, lambda index: index["shards"][shard].update(index_sha256=sha))


def put(column: str, value: object, row: int = 2) -> Spoil:
    return lambda folder: edit_table(folder, lambda table: table[column].__setitem__(row, value))


def say(**values: object) -> Spoil:
    return lambda folder: edit_index(folder, lambda index: index.update(values))


def entry(**values: object) -> Spoil:
    return lambda folder: edit_index(folder, lambda index: index["shards"][1].update(values))


TABLE_LIES = [
    *(put("offset", value) for value in (-512, 0, 10_000, 1 << 40, 1 << 70, 1.5, "512", None, True)),
    *(put("nbytes", value) for value in (0, -1, 100, 1 << 34)),
    *(put("frames", value) for value in (0, -1, 3, 1 << 40)),
    *(put("label", value) for value in (-1, 2)),
    *(put("crc32", value) for value in (-1, 1 << 32)),
    *(put("sums", value) for value in ("", "0" * 31, "x" * 32, " " * 32, 5)),
    *(put("key", value) for value in ("../x", "a.b", "", "a b", "a\nb", "x" * 201, "\u00e9", "\x1b[2J")),
    *(lambda folder, name=name: edit_table(folder, lambda table: table.pop(name)) for name in ("key", "offset", "sums", "label")),
    lambda folder: edit_table(folder, lambda table: table["key"].pop()),
    lambda folder: edit_table(folder, lambda table: table["offset"].append(512)),
    lambda folder: edit_table(folder, lambda table: table.update(key={"a": 1})),
]
INDEX_LIES = [
    say(size=[8]),
    say(size=[8, 1 << 30]),
    say(size=[8, 0]),
    say(size="88"),
    say(clip_length=-1),
    say(clip_length=1 << 24, size=[999, 999]),
    say(fps=float("nan")),
    say(fps="fast"),
    say(name="a\nb"),
    say(name=5),
    say(classes="ab"),
    say(classes=[1]),
    say(classes=["a", "a"]),
    say(codec={"name": "pickle"}),
    say(codec="npy"),
    say(shards={}),
    say(shards=[5]),
    say(dropped={"x": [0]}),
    say(dropped={"shard-00001.tar": [9]}),
    say(dropped={"shard-00001.tar": 5}),
    say(dropped=5),
    say(dropped=[["shard-00001.tar", [0]]]),
    say(codec={"name": "latent", "dtype": "object"}, tensors={"z": [1]}),
    say(codec={"name": "latent", "dtype": "float32"}, tensors={"z": [-1]}),
    say(codec={"name": "latent", "dtype": "float32"}),
    entry(name="../shard-00001.tar"),
    entry(name="/etc/passwd"),
    entry(name="pipe:touch x"),
    entry(name="shard-00000.tar"),
    entry(name=None),
    entry(bytes=-1),
    entry(bytes="9"),
    entry(samples=1 << 40),
    entry(samples=3),
    entry(sha256="../" * 21 + "a"),
    entry(index_sha256=5),
]


@pytest.mark.parametrize("lie", [*TABLE_LIES, *INDEX_LIES])
def test_an_index_that_lies_is_refused_in_one_line(folder: Path, lie: Spoil) -> None:
    lie(folder)
    with pytest.raises(UserError, match=r"damaged|does not match") as caught:
        ShardSet.open(folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("lie", TABLE_LIES)
def test_a_lying_offset_index_is_skipped_with_its_shard(folder: Path, lie: Spoil) -> None:
    lie(folder)
    shards = ShardSet.open(folder, on_bad="skip")
    assert list(shards.bad) == [1] and "shard-00001.index.json" in shards.bad[1]
    assert shards.num_samples == 12 and shards.clip_length == FRAMES, "the number of samples does not depend on what can be read"
    assert shards.fault(4) == shards.bad[1] and shards.fault(3) is None


NO_JSON = {
    "nothing": "",
    "list": "[]",
    "cut": "{",
    "deep": "[" * 100_000,
    "lists": '{"a": [' + "[]," * (1 << 20) + "0]}",
    "digits": '{"format": 1' + "0" * 9999 + "}",
    "bytes": "\x00\xff",
}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_an_index_that_is_no_json_is_refused(folder: Path, text: str) -> None:
    (folder / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="damaged"):
        ShardSet.open(folder, on_bad="skip")


def test_a_set_of_another_schema_is_refused_always(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(schema=2))
    with pytest.raises(UserError, match="schema 2, this version reads 1"):
        ShardSet.open(folder, on_bad="skip")


def test_what_is_missing_is_noted(folder: Path) -> None:
    (folder / "shard-00000.tar").unlink()
    (folder / "shard-00001.tar").write_bytes(b"short")
    (folder / "shard-00002.index.json").unlink()
    with pytest.raises(UserError, match=r"shard-00000.tar is missing"):
        ShardSet.open(folder)
    shards = ShardSet.open(folder, on_bad="skip")
    assert "is missing" in shards.bad[0] and "has 5 bytes" in shards.bad[1] and "index.json is missing" in shards.bad[2]
    assert shards.num_samples == 12 and shards.keys[0] == "clip0_0" and shards.keys[11] == ""


def test_a_key_that_comes_twice_is_told_or_marked(folder: Path) -> None:
    put("key", "clip0_3")(folder)
    with pytest.raises(UserError, match=r"shard-00001.tar sample clip0_3: the key stands in the set twice"):
        ShardSet.open(folder)
    shards = ShardSet.open(folder, on_bad="skip")
    assert shards.bad == {} and shards.bad_samples == {6: "duplicate key"} and shards.fault(6) == "duplicate key"


def test_dropped_rows_are_left_out(folder: Path) -> None:
    whole = ShardSet.open(folder)
    say(dropped={"shard-00001.tar": [0, 3], "shard-00002.tar": [1]})(folder)
    shards = ShardSet.open(folder)
    rows = [row for row in range(12) if row not in (4, 7, 9)]
    assert shards.keys == [whole.keys[row] for row in rows] and shards.offset.tolist() == whole.offset[rows].tolist()
    assert shards.first_sum.tolist() == whole.first_sum[rows].tolist() and shards.shard.tolist() == whole.shard[rows].tolist()


def test_flipped_bytes_never_do_worse_than_an_error_line(folder: Path) -> None:
    """Damage with fitting hashes: an opened set keeps within the tars, whatever its index says."""
    rng, index, sidecar = random.Random(0), (folder / "index.json").read_bytes(), folder / "shard-00001.index.json"
    table = sidecar.read_bytes()
    for _ in range(400):
        raw, side = bytearray(index), bytearray(table)
        for _ in range(rng.randint(1, 3)):
            target = raw if rng.random() < 0.4 else side
            target[rng.randrange(len(target))] = rng.choice(b'0123456789-"[]{},.:eE\\x\x00\xff')
        sidecar.write_bytes(side)
        old, new = hashlib.sha256(table).hexdigest().encode(), hashlib.sha256(side).hexdigest().encode()
        (folder / "index.json").write_bytes(raw.replace(old, new))
        try:
            shards = ShardSet.open(folder)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        sizes = np.array([entry["bytes"] for entry in shards.meta["shards"]])
        assert ((shards.offset > 0) & (shards.offset + shards.nbytes <= sizes[shards.shard])).all()
        assert shards.first_sum[-1] + shards.frames[-1] <= len(shards.sums)


def test_repeated_keys_are_found_among_many() -> None:
    keys = np.array([f"{number * 2654435761 % 2**32:08x}_{number % 7}" for number in range(20_000)], dtype=bytes)
    assert repeated(keys).tolist() == []
    keys[[700, 19_000, 19_999]] = keys[[3, 3, 5]]
    assert repeated(keys).tolist() == [700, 19_000, 19_999]
    assert repeated(keys[:0]).tolist() == [] and Keys(keys)[700] == Keys(keys)[3]


def test_a_row_of_a_large_set_takes_little_memory(folder: Path) -> None:
    shards = ShardSet.open(folder)
    held = sum(getattr(shards, name).nbytes for name in COLUMNS if name != "sums") + shards.keys.raw.nbytes
    assert held / shards.num_samples <= 64


def test_opening_takes_little_more_memory_than_what_is_held() -> None:
    def tables() -> Iterator[Table]:
        for number in range(50):
            keys = np.array([f"{row:016x}_{number:05d}" for row in range(1000)], dtype=bytes)
            columns = {name: np.full(1000, number, kind) for name, kind in COLUMN_TYPES.items()}
            yield Table(1000, columns | {"key": keys, "sums": np.full(16_000, number, np.uint64)})

    tracemalloc.start()
    try:
        for expected in (16 * 50_000, 0):
            tracemalloc.reset_peak()
            columns = join(tables(), 50_000, expected)
            assert not len(repeated(columns["key"]))
            held, peak = sum(column.nbytes for column in columns.values()), tracemalloc.get_traced_memory()[1]
            assert columns["sums"].tolist() == np.repeat(np.arange(50), 16_000).tolist() and columns["label"][-1] == 49
            assert peak < (1.3 if expected else 2.5) * held, "room of a size that is not known is made as it goes"
            del columns
    finally:
        tracemalloc.stop()


def test_more_samples_than_memory_are_refused_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("datasets.shards.join", full)
    with pytest.raises(UserError, match="12 samples, more than there is memory for"):
        ShardSet.open(folder)
