"""The shard set on disk: tars that webdataset reads, an index of offsets beside each, and `index.json`, written last, over all.

shard-00000.tar         <key>.npy or <key>.mp4, <key>.json (+ <key>.cls, <key>.txt), samples in fixed order
shard-00000.index.json  for each sample: key, offset and size of the clip's bytes, crc32, frames, label, checksum of each stored frame
index.json              schema version, source, licence, clip length, fps, size, classes, codec, transform, shards with sha256
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

SCHEMA = 1
FORMAT = "kinoform-shards"
INDEX = "index.json"
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})  # fmt: skip
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def sidecar_name(shard: str) -> str:
    """Name of the offset index of a shard."""
    return Path(shard).stem + ".index.json"


def word_type(frame_bytes: int) -> np.dtype:
    """The widest little-endian unsigned integer that divides a frame: frames are summed in these words."""
    return np.dtype(next(f"<u{size}" for size in (8, 4, 2, 1) if frame_bytes % size == 0))


def frame_sums(frames: np.ndarray) -> np.ndarray:
    """Checksum of each frame, uint8 (..., bytes) -> uint64 (...): the sum of its words modulo 2**64.

    It runs at memory speed (a CRC does not), misses no flipped bit, no zeroed or foreign block; only words that change places escape it.
    """
    return np.add.reduce(frames.view(word_type(frames.shape[-1])), axis=-1, dtype=np.uint64)


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set. Columns hold one row a sample, in the order of the shards."""

    folder: Path
    meta: dict[str, Any]
    digest: str
    """sha256 of index.json: names the exact data."""
    keys: list[str]
    shard: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    crc32: np.ndarray
    frames: np.ndarray
    label: np.ndarray
    sums: np.ndarray
    """uint64, all frames of all samples one after the other; empty for compressed clips."""
    first_sum: np.ndarray
    """Where a sample's sums begin."""

    @classmethod
    def open(cls, path: Path | str) -> "ShardSet":
        """Reads the indices (no clip) of the shard set at `path`.

        Raises UserError when the folder is missing, empty or a raw video folder, has another schema version, or a shard is
        missing or not as large as it was written.
        """
        folder = Path(path)
        raw = _read_index(folder)
        meta = _parse(folder / INDEX, raw)
        if meta.get("format") != FORMAT:
            raise UserError(f"{folder / INDEX} is not the index of a shard set: write one with preprocess.py shards")
        if meta.get("schema") != SCHEMA:
            raise UserError(f"{folder} has shard schema {meta.get('schema')}, this version reads {SCHEMA}: run preprocess.py shards again")
        try:
            return cls._assemble(folder, meta, hashlib.sha256(raw).hexdigest())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is damaged ({error!r}): copy the set again or rerun preprocess.py") from None

    @classmethod
    def _assemble(cls, folder: Path, meta: dict[str, Any], digest: str) -> "ShardSet":
        tables = [_read_sidecar(folder, entry) for entry in meta["shards"]]
        counts = np.array([len(table["key"]) for table in tables])
        columns = {
            name: np.concatenate([np.asarray(table[name], dtype=np.int64) for table in tables])
            for name in ("offset", "nbytes", "crc32", "frames", "label")
        }
        sums = np.frombuffer(bytes.fromhex("".join("".join(table["sums"]) for table in tables)), dtype=">u8").astype(np.uint64)
        first_sum = np.cumsum(columns["frames"]) - columns["frames"]
        keys = [key for table in tables for key in table["key"]]
        shard = np.repeat(np.arange(len(tables)), counts)
        return cls(folder, meta, digest, keys, shard, sums=sums, first_sum=first_sum, **columns)

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def clip_length(self) -> int:
        """Frames of every clip; of the shortest one where whole videos are stored."""
        return int(self.frames.min())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.meta["size"][0], self.meta["size"][1]

    @property
    def fps(self) -> float:
        """The most common frame rate of the clips, after the frame stride."""
        return float(self.meta["fps"])

    @property
    def classes(self) -> list[str]:
        """Class names in label order; empty when unlabelled."""
        return list(self.meta["classes"])

    @property
    def name(self) -> str:
        return str(self.meta["name"])

    @property
    def codec(self) -> str:
        """npy (uncompressed uint8 frames t h w c) or mp4 (H.264)."""
        return str(self.meta["codec"]["name"])

    def shard_path(self, sample: int) -> Path:
        """The tar that holds a sample."""
        return self.folder / self.meta["shards"][int(self.shard[sample])]["name"]

    def describe(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard_path(sample)} sample {self.keys[sample]}"


def _read_index(folder: Path) -> bytes:
    if not folder.exists():
        raise UserError(f"no shard set at {folder}: the folder does not exist")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that preprocess.py shards wrote")
    try:
        return (folder / INDEX).read_bytes()
    except FileNotFoundError:
        raise UserError(_why_no_index(folder)) from None


def _why_no_index(folder: Path) -> str:
    if next(folder.glob("shard-*.tar"), None) or (folder / ".work").exists():
        return f"{folder} holds an unfinished shard set (no {INDEX}): run the same preprocess.py command again, it goes on where it stopped"
    names = [entry for pattern in ("*", "*/*", "*/*/*") for entry in _some(folder, pattern)]
    if any(entry.suffix.lower() in VIDEO_SUFFIXES for entry in names):
        out = folder.absolute().with_name(folder.absolute().name + "-shards")
        return f"{folder} holds videos, not shards: first run  python preprocess.py shards {folder} --out {out}  and give {out}"
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in names):
        out = folder.absolute().with_name(folder.absolute().name + "-shards")
        return f"{folder} holds pictures, not shards: first run  python preprocess.py shards {folder} --dataset-name frames --out {out}"
    if not names:
        return f"{folder} is empty: give the folder that preprocess.py shards wrote"
    return f"{folder} holds no {INDEX}: give the folder that preprocess.py shards wrote"


def _some(folder: Path, pattern: str, limit: int = 1000) -> list[Path]:
    return [path for path, _ in zip(folder.glob(pattern), range(limit), strict=False)]


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run preprocess.py shards again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not an index of a shard set")
    return value


def _read_sidecar(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The offset index of one shard, after a look at the sizes on disk."""
    shard, sidecar = folder / entry["name"], folder / sidecar_name(entry["name"])
    try:
        size, raw = shard.stat().st_size, sidecar.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"shard set {folder} is incomplete: {error.filename} is missing; copy it again or rerun preprocess.py") from None
    if size != entry["bytes"]:
        raise UserError(f"{shard} has {size} bytes, {INDEX} says {entry['bytes']}: it is damaged; copy it again or rerun preprocess.py")
    if hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
        raise UserError(f"{sidecar} does not match {INDEX}: it is damaged; copy it again or rerun preprocess.py")
    return _parse(sidecar, raw)
