"""The whole truth about a shard set: every file hashed, every sample decoded and compared with its checksums, card and label."""

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datasets.conditions import MEMBER
from datasets.indices import DAMAGE, one_line
from datasets.prepare.stored import BadSample, SetFacts, check_sample
from datasets.prepare.tars import BLOCK, BadTar, Member, read_end, read_members
from datasets.prepare.workers import worker_pool
from datasets.shards import FORMAT, INDEX, SCHEMA, ShardSet, sidecar_name
from datasets.tables import MAX_SHARD_BYTES, Table, check_meta, parse_json, read_table, repeated
from utils.errors import UserError
from utils.files import sha256_file


@dataclass(frozen=True)
class Fault:
    """Something wrong: in which shard, with which sample (empty: with the shard itself), and what."""

    shard: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.shard}{' sample ' + self.key if self.key else ''}: {self.text}"


@dataclass
class ShardCheck:
    """What the check of one shard found."""

    name: str
    samples: int = 0
    faults: list[Fault] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, "S1"))
    """Of the samples, as bytes: those of a whole set are compared in the end."""

    def fault(self, text: str, key: str = "") -> None:
        """Notes something wrong."""
        self.faults.append(Fault(self.name, key, text))


def read_set(folder: Path) -> dict[str, Any]:
    """index.json of a local shard set. UserError when it is not there, unreadable, or not what it should be."""
    path = folder / INDEX
    try:
        index = parse_json(path.read_bytes())
        if index.get("format") != FORMAT:
            raise ValueError("not the index of a shard set")
        if index.get("schema") != SCHEMA:
            raise UserError(f"{folder} has shard schema {index.get('schema')}, this version reads {SCHEMA}: run preprocess.py shards again")
        check_meta(index)
    except (FileNotFoundError, NotADirectoryError):
        ShardSet.open(folder)  # says what the folder holds instead
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): copy it again or rerun preprocess.py") from None
    return index


def check_set(folder: Path, index: dict[str, Any], workers: int) -> Iterator[ShardCheck]:
    """Checks the shards of a set in order, `workers` at a time; last comes what is wrong with the set as a whole."""
    entries = index["shards"]
    meta = {name: value for name, value in index.items() if name not in ("shards", "dropped")}
    keys: list[np.ndarray] = []
    with ExitStack() as stack:
        results: Iterator[ShardCheck] = (check_shard(folder, entry, meta) for entry in entries)
        if workers > 1 and len(entries) > 1:
            pool = stack.enter_context(worker_pool(min(workers, len(entries))))
            futures = [pool.submit(check_shard, folder, entry, meta) for entry in entries]
            results = (future.result() for future in futures)
        try:
            for result in results:
                keys.append(result.keys)
                yield result
        except BrokenProcessPool:
            raise UserError("a worker process died (out of memory, or a decoder crashed): --workers 1 shows at which shard") from None
    yield _check_whole(index, keys)


def check_shard(folder: Path, entry: dict[str, Any], meta: dict[str, Any]) -> ShardCheck:
    """Hashes a shard and its offset index, and checks every sample. `meta`: index.json without the shards."""
    found = ShardCheck(entry["name"])
    table = _read_table(folder, entry, meta, found)
    try:
        size = (folder / found.name).stat().st_size
        if size != entry["bytes"]:
            found.fault(f"it has {size} bytes, {INDEX} says {entry['bytes']}")
        elif sha256_file(folder / found.name) != entry["sha256"]:
            found.fault(f"its sha256 is not the one in {INDEX}")
        if table is not None:
            with (folder / found.name).open("rb") as file:
                _check_samples(file, table, SetFacts.of(meta), found)
    except FileNotFoundError:
        found.fault("it is missing")
    except OSError as error:
        found.fault(f"it cannot be read: {error.strerror}")
    return found


def _read_table(folder: Path, entry: dict[str, Any], meta: dict[str, Any], found: ShardCheck) -> Table | None:
    """A shard's offset index, None where there is nothing to go by."""
    name = sidecar_name(entry["name"])
    try:
        raw = (folder / name).read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
            found.fault(f"the sha256 of its {name} is not the one in {INDEX}")
        return read_table(raw, meta, entry)
    except OSError as error:
        found.fault(f"its {name} cannot be read: {error.strerror}")
    except DAMAGE as error:
        found.fault(f"its {name} is damaged: {one_line(error)}")
    return None


def _check_samples(file: BinaryIO, table: Table, facts: SetFacts, found: ShardCheck) -> None:
    """Walks through a tar from its first byte to its last, by the headers; after a fault it goes on where the offset index says."""
    columns = {name: column.tolist() for name, column in table.columns.items() if name not in ("key", "sums")}
    found.samples, found.keys, stored = table.rows, table.columns["key"], table.columns["sums"]
    ends = [offset - BLOCK for offset in columns["offset"]][1:] + [MAX_SHARD_BYTES]
    sums = np.split(stored, np.cumsum(columns["frames"])[:-1]) if len(stored) else [stored] * found.samples
    place = 0
    for row, raw in enumerate(found.keys):
        key = raw.decode("ascii")
        try:
            members, place = read_members(file, place, key, ends[row])
            _check_payload(members[0], columns, row)
            _check_place(members, columns, row)
            content = [(member.extension, member.payload) for member in members]
            check_sample(key, content, facts, columns["frames"][row], columns["label"][row], sums[row])
        except (BadTar, BadSample) as error:
            found.fault(str(error), key)
            if row + 1 == found.samples:
                return
            place = ends[row]
    try:
        read_end(file, place)
    except BadTar as error:
        found.fault(str(error))


def _check_payload(member: Member, columns: dict[str, list[int]], row: int) -> None:
    told, found = (columns["nbytes"][row], columns["offset"][row]), (len(member.payload), member.offset)
    if told != found:
        raise BadSample(f"{found[0]} bytes at byte {found[1]}, its offset index says {told[0]} at {told[1]}")
    if zlib.crc32(member.payload) != columns["crc32"][row]:
        raise BadSample("its bytes are damaged (crc32)")


def _check_place(members: list[Member], columns: dict[str, list[int]], row: int) -> None:
    """Where the condition vector stands, where there is one."""
    for member in members:
        if member.extension == MEMBER and "cond_offset" in columns:
            if member.offset != columns["cond_offset"][row]:
                raise BadSample(f"its condition vector is at byte {member.offset}, its offset index says {columns['cond_offset'][row]}")
            if zlib.crc32(member.payload) != columns["cond_crc32"][row]:
                raise BadSample("its condition vector is damaged (crc32)")


def _check_whole(index: dict[str, Any], keys: list[np.ndarray]) -> ShardCheck:
    """What only shows over all shards: the number of samples, rows that are left out, keys that come twice."""
    found = ShardCheck(INDEX)
    samples = {entry["name"]: entry["samples"] for entry in index["shards"]}
    dropped = index.get("dropped") or {}
    for name, rows in dropped.items():
        if not all(type(row) is int and 0 <= row < samples[name] for row in rows) or len(set(rows)) != len(rows):
            found.fault(f"the rows to leave out of {name} are not rows of that shard")
    total = sum(samples.values()) - sum(map(len, dropped.values()))
    if index.get("samples") != total:
        found.fault(f"it says {index.get('samples')} samples, its shards have {total}")
    ends = np.cumsum([len(part) for part in keys])
    together = np.concatenate(keys) if keys else np.zeros(0, "S1")
    for row in repeated(together).tolist():
        name = index["shards"][int(np.searchsorted(ends, row, side="right"))]["name"]
        found.faults.append(Fault(name, together[row].decode("ascii"), "its key stands in the set before"))
    return found
