"""Writes shards: each tar and its offset index appear whole, with the same bytes for the same samples."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datasets.conditions import MEMBER
from datasets.shards import SCHEMA, frame_sums, sidecar_name
from utils.errors import UserError
from utils.files import atomic_write_bytes, fsync_path, sha256_file

SET_FILES = ("index.json", "report.json", "sheet.png")
"""What stands in a set's folder beside the shards."""
_UNFINISHED = ("shard-*.tar.tmp", ".shard-*.tmp", *(f".{name}.*.tmp" for name in SET_FILES))


@dataclass(frozen=True)
class Sample:
    """A clip ready to be stored. `members`: extension -> bytes, the clip itself first (npy or mp4)."""

    key: str
    members: dict[str, bytes]
    frames: int
    label: int
    sums: str
    """Hexadecimal checksums of the frames, 16 digits each; empty for compressed clips."""


def dump_json(value: object) -> bytes:
    """Compact JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@cache
def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def npy_bytes(frames: Sequence[np.ndarray] | np.ndarray) -> bytes:
    """The npy file of uint8 (t, h, w, c), or of t frames (h, w, c)."""
    return b"".join([_npy_header((len(frames), *frames[0].shape)), *(np.ascontiguousarray(frame).data for frame in frames)])


def sums_text(frames: np.ndarray) -> str:
    """Checksums of uint8 frames (t, h, w, c) as they stand in the offset index."""
    return frame_sums(np.ascontiguousarray(frames).reshape(len(frames), -1)).astype(">u8").tobytes().hex()


class _Hashing:
    """A file that hashes and counts what is written through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.count = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.count += len(data)
        self.file.write(data)

    def pad(self, block: int) -> None:
        """Zeros up to the next multiple of `block` bytes."""
        self.write(bytes(-self.count % block))


def _table() -> dict[str, list[Any]]:
    return {name: [] for name in ("key", "offset", "nbytes", "crc32", "frames", "label", "sums")}


def shard_name(number: int, part: int | None = None) -> str:
    """File name of shard `number`; of part `part`, where the set is made in several."""
    return f"shard-{number:05d}.tar" if part is None else f"shard-{part:04d}-{number:05d}.tar"


@dataclass
class ShardWriter:
    """One shard being written. `close` commits it: first the tar, then its offset index; a tar without index is not finished."""

    folder: Path
    name: str
    table: dict[str, list[Any]] = field(default_factory=_table)

    def __post_init__(self) -> None:
        self.path = self.folder / self.name
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.file = _Hashing(self.temporary.open("wb"))

    @property
    def samples(self) -> int:
        return len(self.table["key"])

    @property
    def nbytes(self) -> int:
        return self.file.count

    def add(self, sample: Sample) -> None:
        """Appends the members of a sample one after the other."""
        first = True
        for extension, payload in sample.members.items():
            info = tarfile.TarInfo(f"{sample.key}.{extension}")
            info.size, info.mode = len(payload), 0o644
            # pax headers would hold times; plain ustar with fixed fields gives the same bytes each time. The payload is written as it
            # is: tarfile would copy it in small pieces, which costs more than what is done with them.
            self.file.write(info.tobuf(tarfile.USTAR_FORMAT))
            offset = self.file.count
            self.file.write(payload)
            self.file.pad(tarfile.BLOCKSIZE)
            if first:
                values = (sample.key, offset, len(payload), zlib.crc32(payload), sample.frames, sample.label, sample.sums)
                for name, value in zip(_table(), values, strict=True):
                    self.table[name].append(value)
            elif extension == MEMBER:
                for name, value in (("cond_offset", offset), ("cond_crc32", zlib.crc32(payload))):
                    self.table.setdefault(name, []).append(value)
            first = False

    def abandon(self) -> None:
        """Gives up: what was written so far goes, so that a full disk is not kept full."""
        with suppress(OSError):
            self.file.file.close()
        self.temporary.unlink(missing_ok=True)

    def close(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Commits the shard. Returns its offset index, which keeps `progress` (where the next shard begins, what was skipped)."""
        self.file.write(bytes(2 * tarfile.BLOCKSIZE))
        self.file.pad(tarfile.RECORDSIZE)
        self.file.file.flush()
        os.fsync(self.file.file.fileno())
        self.file.file.close()
        os.replace(self.temporary, self.path)
        fsync_path(self.folder)
        tar = {"bytes": self.file.count, "sha256": self.file.sha256.hexdigest()}
        table = {"schema": SCHEMA, "tar": tar, "progress": progress} | self.table
        atomic_write_bytes(self.folder / sidecar_name(self.path.name), dump_json(table))
        return table


def finished_shard(folder: Path, name: str) -> dict[str, Any] | None:
    """The offset index of a shard, when both files are there and the tar's hash is right; else None."""
    try:
        table = json.loads((folder / sidecar_name(name)).read_bytes())
        whole = sha256_file(folder / name) == table["tar"]["sha256"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return table if whole else None


def shard_entry(folder: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """The row of index.json about a finished shard."""
    raw = (folder / sidecar_name(name)).read_bytes()
    return {"name": name, "samples": len(table["key"]), "index_sha256": hashlib.sha256(raw).hexdigest()} | table["tar"]


def remove_shards(folder: Path, keep: int, part: int | None = None) -> None:
    """Deletes the shards of a part (or of a set in one part) from number `keep` on, with what a killed process left of them."""
    stem = "shard-" if part is None else f"shard-{part:04d}-"
    kept = {name for number in range(keep) for name in (shard_name(number, part), sidecar_name(shard_name(number, part)))}
    _remove(folder, (f"{stem}*", f".{stem}*.tmp"), kept)


def remove_unfinished(folder: Path) -> None:
    """Deletes what killed processes left half written. Only when all shards of the set are finished."""
    _remove(folder, _UNFINISHED, set())


def remove_set(folder: Path) -> None:
    """Deletes what the toolkit wrote into a shard folder."""
    _remove(folder, ("shard-*.tar", "shard-*.index.json", *_UNFINISHED, *SET_FILES), set())


def _remove(folder: Path, patterns: tuple[str, ...], kept: set[str]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.name not in kept:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"cannot delete {path}: {error.strerror}") from None
