"""The indices of a shard set, read with suspicion: they may come from anywhere, and what they say decides what is read and allocated.

Every number is checked here once, against the limits below and against each other, so that the readers need not.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from datasets.conditions import CondFormat
from datasets.storage import HASH, check_name

MAX_INDEX_BYTES = 1 << 26
MAX_SIDECAR_BYTES = 1 << 28
MAX_JSON_LISTS = 1 << 20
"""Lists and objects of an index: an empty one takes 20 times the memory of its text."""
MAX_SHARD_BYTES = 1 << 42
MAX_MEMBER_BYTES = (1 << 33) - 1
"""What the size field of a tar member can say."""
MAX_HEADER_BYTES = 1 << 20
"""Most that may stand in a member before the frames (npy) or tensors (safetensors)."""
MAX_SIDE = 16384
MAX_FRAMES = 1 << 24
MAX_CLIP_BYTES = 1 << 33
"""Decoded size of one training clip, or of the tensors of one sample."""
MAX_CLASSES = 1 << 20
MAX_NAME = 200
TAR_BLOCK = 512
_CHUNK = 1 << 16
"""Keys that are hashed at a time."""

CODECS = ("npy", "mp4", "latent")
TENSOR_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
KEYS = re.compile(r"(?:[!-\-0-\[\]-~]{1,200}\n)*")
"""Keys, one a line: printable ASCII without space, dot, slash and backslash."""
COLUMNS: dict[str, type[np.number]] = {"offset": np.int64, "nbytes": np.int64, "crc32": np.uint32, "frames": np.int64, "label": np.int64}
COND_COLUMNS: dict[str, type[np.number]] = {"cond_offset": np.int64, "cond_crc32": np.uint32}
"""Of sets with condition vectors: see `datasets.conditions`."""


class Keys(Sequence[str]):
    """Keys of samples, kept as bytes of one array (a list of strings takes 4 times as much)."""

    def __init__(self, raw: np.ndarray) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> "Keys": ...
    def __getitem__(self, row: int | slice) -> "str | Keys":
        return Keys(self.raw[row]) if isinstance(row, slice) else self.raw[row].decode("ascii")

    def __iter__(self) -> Iterator[str]:
        return (key.decode("ascii") for key in self.raw)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return bool(np.array_equal(self.raw, other.raw))
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Table:
    """One shard's samples, a row each, in columns: key, those of COLUMNS (and COND_COLUMNS), and sums (uint64, all frames of all samples
    in one row)."""

    rows: int
    columns: dict[str, np.ndarray]

    @classmethod
    def blank(cls, rows: int) -> "Table":
        """Rows of which nothing is known."""
        columns = {name: np.zeros(rows, kind) for name, kind in COLUMNS.items()}
        return cls(rows, columns | {"key": np.zeros(rows, "S1"), "sums": np.zeros(0, np.uint64)})


def kinds(meta: dict[str, Any]) -> dict[str, type[np.number]]:
    """Types of the columns that the offset indices of a set have, besides key and sums."""
    return COLUMNS | (COND_COLUMNS if CondFormat.of(meta) else {})


def join(tables: Iterable[Table], rows: int, sums: int, columns: Mapping[str, type[np.number]] = COLUMNS) -> dict[str, np.ndarray]:
    """The `columns` of all tables, `rows` together, one after the other: room is made once, and each table can go when it is copied.

    `sums`: how many sums are expected.
    """
    joined = {name: np.empty(rows, kind) for name, kind in columns.items()} | {
        "key": np.empty(rows, "S1"),
        "sums": np.empty(sums, np.uint64),
    }
    first = filled = 0
    for table in tables:
        last, width = first + table.rows, table.columns["key"].dtype
        for name in columns:
            joined[name][first:last] = table.columns.get(name, 0)
        if width.itemsize > joined["key"].dtype.itemsize:
            joined["key"] = joined["key"].astype(width)
        joined["key"][first:last] = table.columns["key"]
        end = filled + len(table.columns["sums"])
        if end > len(joined["sums"]):
            larger = np.empty(max(end, 2 * filled), np.uint64)  # memory that is not written to costs nothing
            larger[:filled] = joined["sums"][:filled]
            joined["sums"] = larger
        joined["sums"][filled:end] = table.columns["sums"]
        first, filled = last, end
    return joined | {"sums": joined["sums"][:filled]}


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object; ValueError otherwise."""
    if raw.count(b"[") + raw.count(b"{") > MAX_JSON_LISTS:
        raise ValueError("too many lists")
    try:
        value = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def check_meta(meta: dict[str, Any]) -> None:
    """ValueError, KeyError or TypeError when index.json says what cannot be."""
    _number(meta["clip_length"], "clip_length", 0, MAX_FRAMES)
    if len(meta["size"]) != 2:
        raise ValueError(f"size {meta['size']!r} is not height and width")
    for side in meta["size"]:
        _number(side, "size", 1, MAX_SIDE)
    if not 0 <= float(meta["fps"]) < math.inf:
        raise ValueError(f"fps {meta['fps']!r}")
    if not (isinstance(meta["name"], str) and meta["name"].isprintable() and len(meta["name"]) <= MAX_NAME):
        raise ValueError("name is not a line of text")
    if not (isinstance(meta["classes"], list) and len(meta["classes"]) <= MAX_CLASSES and all(isinstance(x, str) for x in meta["classes"])):
        raise ValueError("classes is not a list of names")
    if len(set(meta["classes"])) < len(meta["classes"]):
        raise ValueError("a class is named twice")
    if meta["codec"]["name"] not in CODECS:
        raise ValueError(f"codec {meta['codec']['name']!r} is none of {', '.join(CODECS)}")
    if max(1, stored_rows(meta)) * frame_bytes(meta) > MAX_CLIP_BYTES:
        raise ValueError(f"a sample of more than {MAX_CLIP_BYTES >> 30} GiB")
    if by_frame(meta) and meta["codec"]["name"] == "latent" and [*meta["tensors"]] not in (["moments"], ["sample"]):
        raise ValueError("latents of frames are moments or a sample")
    CondFormat.of(meta)
    if not isinstance(meta["shards"], list):
        raise ValueError("shards is not a list")
    names = [_check_entry(entry) for entry in meta["shards"]]
    if len(set(names)) < len(names):
        raise ValueError("a shard is named twice")
    for name, rows in meta.get("dropped", {}).items():
        if name not in names or not isinstance(rows, list):
            raise ValueError(f"dropped names {str(name)[:MAX_NAME]!r}")


def _check_entry(entry: dict[str, Any]) -> str:
    name = check_name(entry["name"])
    _number(entry["bytes"], "bytes", 1, MAX_SHARD_BYTES)
    _number(entry["samples"], "samples", 0, entry["bytes"] // TAR_BLOCK)
    for field in ("sha256", "index_sha256"):
        if not HASH.fullmatch(entry[field]):
            raise ValueError(f"{name}: {field}")
    return name


def by_frame(meta: dict[str, Any]) -> bool:
    """Whether a sample has a row for each frame: of pixels, or of latents of an encoder of frames."""
    return meta["codec"]["name"] != "latent" or meta["codec"].get("framewise") is True


def stored_rows(meta: dict[str, Any]) -> int:
    """Rows of a sample, each with a checksum where it is raw: 1 for latents of whole clips, else its frames; 0 where they differ."""
    return int(meta["clip_length"]) if by_frame(meta) else 1


def frame_bytes(meta: dict[str, Any]) -> int:
    """Decoded bytes of a row: a frame, its latents, or all tensors of a clip."""
    if meta["codec"]["name"] != "latent":
        return int(meta["size"][0]) * int(meta["size"][1]) * 3
    values = 0
    for shape in meta["tensors"].values():
        for side in shape:
            _number(side, "tensors", 1, MAX_CLIP_BYTES)
        values += math.prod(shape)
    return values * TENSOR_BYTES[meta["codec"]["dtype"]]


def read_table(raw: bytes, meta: dict[str, Any], entry: dict[str, Any]) -> Table:
    """The offset index of one shard. ValueError, KeyError, TypeError or OverflowError when it says what cannot be."""
    value = parse_json(raw)
    keys = value["key"]
    rows = entry["samples"]
    if not isinstance(keys, list) or len(keys) != rows:
        raise ValueError(f"{len(keys)} keys for {rows} samples")
    text = "".join(f"{key}\n" for key in keys)
    if not KEYS.fullmatch(text) or text.count("\n") != rows:
        raise ValueError("a key with characters that it may not have")
    columns = {name: _column(value.get(name, []), name, rows).astype(kind, copy=False) for name, kind in kinds(meta).items()}
    _check_columns(columns, meta, entry)
    columns["sums"] = _sums(value["sums"], columns["frames"], meta)
    return Table(rows, columns | {"key": np.array(keys, dtype=bytes).reshape(rows)})


def _check_columns(columns: dict[str, np.ndarray], meta: dict[str, Any], entry: dict[str, Any]) -> None:
    offset, nbytes, frames = columns["offset"], columns["nbytes"], columns["frames"]
    _within(offset, "offset", TAR_BLOCK, entry["bytes"])
    _within(nbytes, "nbytes", 1, MAX_MEMBER_BYTES)
    _within(offset + nbytes, "end", TAR_BLOCK, entry["bytes"])
    _within(columns["label"], "label", 0, max(1, len(meta["classes"])) - 1)
    if "cond_offset" in columns:
        _within(columns["cond_offset"], "cond_offset", TAR_BLOCK, entry["bytes"] - meta["cond_nbytes"])
    exact = stored_rows(meta)
    _within(frames, "frames", exact or 1, exact or MAX_FRAMES)
    if meta["codec"]["name"] != "mp4":
        _within(nbytes - frames * frame_bytes(meta), "header", 0, MAX_HEADER_BYTES)


def _sums(texts: Any, frames: np.ndarray, meta: dict[str, Any]) -> np.ndarray:
    if not isinstance(texts, list) or len(texts) != len(frames):
        raise ValueError("sums")
    if meta["codec"]["name"] == "mp4":
        if any(texts):
            raise ValueError("sums of compressed frames")
        return np.zeros(0, np.uint64)
    if not np.array_equal([len(text) for text in texts], 16 * frames):
        raise ValueError("not one checksum a frame")
    sums = np.frombuffer(bytes.fromhex("".join(texts)), dtype=">u8").astype(np.uint64)
    if len(sums) != frames.sum():  # fromhex passes over blanks
        raise ValueError("not one checksum a frame")
    return sums


def _column(values: Any, name: str, rows: int) -> np.ndarray:
    """A list of whole numbers; numpy itself would take halves, words and truth values for numbers."""
    column = np.asarray(values) if rows else np.zeros(0, np.int64)
    if (
        column.shape != (rows,)
        or column.dtype.kind != "i"
        or (name.endswith("crc32") and rows and not 0 <= column.min() <= column.max() < 1 << 32)
    ):
        raise ValueError(f"column {name}")
    return column


def _number(value: Any, name: str, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} {str(value)[:MAX_NAME]}: must be a whole number from {least} to {most}")


def _within(column: np.ndarray, name: str, least: int, most: int) -> None:
    if len(column) and not (least <= column.min() and column.max() <= most):
        raise ValueError(f"{name} from {column.min()} to {column.max()}: must be within {least} and {most}")


def repeated(keys: np.ndarray) -> np.ndarray:
    """Rows whose key stood in an earlier row. Keys are bytes of one width; sorts their hashes, not themselves (8 times as fast)."""
    hashes = np.concatenate([_hashes(keys[first : first + _CHUNK]) for first in range(0, max(1, len(keys)), _CHUNK)])
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return np.zeros(0, np.int64)
    suspects = np.flatnonzero(np.isin(hashes, twice))
    first = np.unique(keys[suspects], return_index=True)[1]
    return np.delete(suspects, first)


def _hashes(keys: np.ndarray) -> np.ndarray:
    width = -(-keys.dtype.itemsize // 8) * 8
    words = keys.astype(f"S{width}").view(np.uint64).reshape(len(keys), width // 8)
    hashes = np.zeros(len(keys), np.uint64)
    for column in words.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes
