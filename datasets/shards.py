"""The shard set on disk: tars that webdataset reads, an index of offsets beside each, and `index.json`, written last, over all.

shard-00000.tar         <key>.npy or <key>.mp4, <key>.json (+ <key>.cls, <key>.txt, <key>.emb.npy), samples in fixed order
shard-00000.index.json  for each sample: key, offset and size of the clip's bytes, crc32, frames, label, checksum of each stored frame
index.json              schema version, source, licence, clip length, fps, size, classes, codec, transform, shards with sha256
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datasets.conditions import CondFormat
from datasets.indices import BLANK, DAMAGE, INDEX, kept_rows, one_line, read_tables, sidecar_name
from datasets.storage import CacheConfig, LocalStorage, MissingFile, Storage, open_storage
from datasets.tables import MAX_INDEX_BYTES, Keys, check_meta, join, kinds, parse_json, repeated, stored_rows
from utils.errors import UserError

__all__ = ["FORMAT", "IMAGE_SUFFIXES", "INDEX", "SCHEMA", "VIDEO_SUFFIXES", "ShardSet", "frame_sums", "sidecar_name", "word_type"]

SCHEMA = 1
FORMAT = "kinoform-shards"
OnBad = Literal["fail", "skip"]
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})  # fmt: skip
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


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

    storage: Storage
    meta: dict[str, Any]
    digest: str
    """sha256 of index.json: names the exact data."""
    keys: Keys
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
    bad: dict[int, str]
    """Number of a shard that cannot be read -> why. Where its offset index is bad too, its rows are there but blank."""
    bad_samples: dict[int, str]
    """Further samples that are not to be used -> why: their key stands in an earlier row already."""
    cond_offset: np.ndarray | None = None
    """Where the condition vectors begin, and `cond_crc32` of each; None where there are none."""
    cond_crc32: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path | str, *, cache: CacheConfig | None = None, on_bad: OnBad = "fail") -> "ShardSet":
        """Reads the indices (no clip) of the shard set at `path`, a folder, URL or `pipe:` command (see `datasets.storage`).

        Raises UserError when it is missing, empty or a raw video folder, has another schema version, or cannot be what index.json
        says. A shard that is missing, has another size or a damaged offset index, and a key that comes twice, raise too, or are
        noted in `bad` and `bad_samples` when `on_bad` is "skip"; the samples count all the same, so that every process that reads
        the same index.json has the same number of them.
        """
        storage = open_storage(path, cache)
        raw = _read_index(storage)
        where = storage.describe(INDEX)
        try:
            meta = parse_json(raw)
        except ValueError as error:
            raise UserError(f"{where} is damaged ({error}): run preprocess.py shards again") from None
        if meta.get("format") != FORMAT:
            raise UserError(f"{where} is not the index of a shard set: write one with preprocess.py shards")
        if meta.get("schema") != SCHEMA:
            schema = str(meta.get("schema"))[:20]
            raise UserError(f"{storage.describe()} has shard schema {schema}, this version reads {SCHEMA}: run preprocess.py shards again")
        try:
            check_meta(meta)
        except DAMAGE as error:
            raise UserError(f"{where} is damaged ({one_line(error)}): copy the set again or rerun preprocess.py") from None
        bad: dict[int, str] = {}
        counts = [entry["samples"] for entry in meta["shards"]]
        sums = 0 if meta["codec"]["name"] == "mp4" else sum(counts) * stored_rows(meta)
        try:
            columns = join(read_tables(storage, meta, bad, on_bad), sum(counts), sums, kinds(meta))
        except MemoryError:
            raise UserError(f"{where} names {sum(counts)} samples, more than there is memory for: use a larger machine or fewer") from None
        opened = cls._assemble(storage, meta, hashlib.sha256(raw).hexdigest(), counts, columns, bad)
        opened._check_keys(on_bad)
        return opened

    @classmethod
    def _assemble(
        cls, storage: Storage, meta: dict[str, Any], digest: str, counts: list[int], columns: dict[str, np.ndarray], bad: dict[int, str]
    ) -> "ShardSet":
        keys, sums = columns.pop("key"), columns.pop("sums")
        shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first_sum = np.cumsum(columns["frames"])
        first_sum -= columns["frames"]
        blank = columns["frames"] == 0
        if blank.any():  # any length that the rest has: no window is ever read of these
            columns["frames"][blank] = columns["frames"][~blank].min() if not blank.all() else max(1, meta["clip_length"])
        kept = kept_rows(meta, counts, storage)
        if kept is not None:
            keys, shard, first_sum = keys[kept], shard[kept], first_sum[kept]
            columns = {name: column[kept] for name, column in columns.items()}
        return cls(storage, meta, digest, Keys(keys), shard, sums=sums, first_sum=first_sum, bad=bad, bad_samples={}, **columns)

    def _check_keys(self, on_bad: OnBad) -> None:
        unknown = [shard for shard, why in self.bad.items() if why.startswith(BLANK)]
        rows = np.flatnonzero(~np.isin(self.shard, unknown)) if unknown else slice(None)
        twice = np.arange(self.num_samples)[rows][repeated(self.keys.raw[rows])].tolist()
        if twice and on_bad == "fail":
            raise UserError(f"{self.describe(twice[0])}: the key stands in the set twice ({len(twice)} such samples): rerun preprocess.py")
        self.bad_samples.update(dict.fromkeys(twice, "duplicate key"))

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched into the cache before they are read."""
        return self.storage.capacity is not None

    @property
    def where(self) -> str:
        """Folder, URL or command, for messages."""
        return self.storage.describe()

    @property
    def folder(self) -> Path:
        """The folder of a local set."""
        return Path(self.where)

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
    def cond(self) -> CondFormat | None:
        """What the condition vectors are; None where there are none."""
        return CondFormat.of(self.meta)

    @property
    def codec(self) -> str:
        """npy (uncompressed uint8 frames t h w c) or mp4 (H.264)."""
        return str(self.meta["codec"]["name"])

    @cached_property
    def largest_shard(self) -> int:
        """Bytes of the largest shard: a cache must have room for it."""
        return max((entry["bytes"] for entry in self.meta["shards"]), default=0)

    def check_cache(self, window: int = 1) -> None:
        """ConfigError when the cache cannot hold the `window` largest shards at once; nothing for a local set."""
        if self.storage.capacity is not None:
            largest = sorted((entry["bytes"] for entry in self.meta["shards"]), reverse=True)[:window]
            what = "the largest shard" if window == 1 else f"reading from {len(largest)} shards at a time"
            self.storage.check_room(sum(largest), f"{what} of {self.where}")

    def shard_file(self, shard: int) -> Path:
        """The tar of a shard, fetched before if the set is remote. UserError when that cannot be. A later fetch may remove it from
        the cache again: `open_shard` is safe from that."""
        return self.storage.fetch(*self._entry(shard))

    def open_shard(self, shard: int) -> int:
        """A descriptor to read the tar of a shard, fetched before if the set is remote; the caller closes it.

        Close those no longer needed: a file that left the cache keeps its place on the disk while it is open. Raises UserError.
        """
        return self.storage.open(*self._entry(shard))

    def _entry(self, shard: int) -> tuple[str, int, str]:
        entry = self.meta["shards"][int(shard)]
        return entry["name"], entry["bytes"], entry["sha256"]

    def shard_name(self, shard: int) -> str:
        """The tar of a shard with its place, for messages."""
        return self.storage.describe(self.meta["shards"][int(shard)]["name"])

    def shard_path(self, sample: int) -> Path:
        """The tar that holds a sample of a local set."""
        return Path(self.shard_name(int(self.shard[sample])))

    def describe(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard_name(int(self.shard[sample]))} sample {self.keys[sample]}"

    def fault(self, sample: int) -> str | None:
        """Why a sample is known not to be usable; None when nothing is known against it."""
        return self.bad.get(int(self.shard[sample])) or self.bad_samples.get(int(sample))


def _read_index(storage: Storage) -> bytes:
    folder = Path(storage.describe())
    if isinstance(storage, LocalStorage) and not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file: give the folder that preprocess.py shards wrote")
        raise UserError(f"no shard set at {folder}: the folder does not exist")
    try:
        return storage.read(INDEX, MAX_INDEX_BYTES)
    except MissingFile:
        if not isinstance(storage, LocalStorage):
            raise
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
