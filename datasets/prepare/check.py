"""The whole truth about a shard set: every file hashed, every sample decoded and compared with its checksums, card and label."""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datasets.prepare.stored import BadSample, SetFacts, check_sample
from datasets.prepare.tars import BLOCK, BadTar, Member, read_end, read_members
from datasets.prepare.workers import worker_pool
from datasets.shards import FORMAT, INDEX, SCHEMA, sidecar_name
from utils.errors import UserError
from utils.files import sha256_file

COLUMNS = ("key", "sums", "offset", "nbytes", "crc32", "frames", "label")
"""Of an offset index: two of text, five of whole numbers."""
Table = dict[str, list[Any]]
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


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
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """64-bit hashes of the samples' keys: keys of a whole set must be compared, and text would not fit into memory."""

    def fault(self, text: str, key: str = "") -> None:
        """Notes something wrong."""
        self.faults.append(Fault(self.name, key, text))


def read_set(folder: Path) -> dict[str, Any]:
    """index.json of a local shard set. UserError when it is not there, unreadable, or not what it should be."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] == FORMAT and index["schema"] != SCHEMA:
            raise UserError(f"{folder} has shard schema {index['schema']}, this version reads {SCHEMA}: run preprocess.py shards again")
        plain = all(_PLAIN.fullmatch(entry["name"]) for entry in index["shards"])
        typed = all(_is_count(entry[name]) for entry in index["shards"] for name in ("samples", "bytes"))
        hashed = all(isinstance(entry[name], str) for entry in index["shards"] for name in ("sha256", "index_sha256"))
        if index["format"] != FORMAT or not (plain and typed and hashed):
            raise ValueError("not the index of a shard set")
        SetFacts.of(index)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder that preprocess.py wrote") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): copy it again or rerun preprocess.py") from None
    return dict(index)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def check_set(folder: Path, index: dict[str, Any], workers: int) -> Iterator[ShardCheck]:
    """Checks the shards of a set in order, `workers` at a time; last comes what is wrong with the set as a whole."""
    facts, entries = SetFacts.of(index), index["shards"]
    keys: list[np.ndarray] = []
    with ExitStack() as stack:
        results: Iterator[ShardCheck] = (check_shard(folder, entry, facts) for entry in entries)
        if workers > 1 and len(entries) > 1:
            pool = stack.enter_context(worker_pool(min(workers, len(entries))))
            futures = [pool.submit(check_shard, folder, entry, facts) for entry in entries]
            results = (future.result() for future in futures)
        try:
            for result in results:
                keys.append(result.keys)
                yield result
        except BrokenProcessPool:
            raise UserError("a worker process died (out of memory, or a decoder crashed): --workers 1 shows at which shard") from None
    yield _check_whole(folder, index, keys)


def check_shard(folder: Path, entry: dict[str, Any], facts: SetFacts) -> ShardCheck:
    """Hashes a shard and its offset index, and checks every sample."""
    found = ShardCheck(entry["name"])
    table = _read_table(folder, entry, found)
    try:
        size = (folder / found.name).stat().st_size
        if size != entry["bytes"]:
            found.fault(f"it has {size} bytes, {INDEX} says {entry['bytes']}")
        elif sha256_file(folder / found.name) != entry["sha256"]:
            found.fault(f"its sha256 is not the one in {INDEX}")
        if table is not None:
            with (folder / found.name).open("rb") as file:
                _check_samples(file, table, facts, found)
    except FileNotFoundError:
        found.fault("it is missing")
    except OSError as error:
        found.fault(f"it cannot be read: {error.strerror}")
    return found


def _read_table(folder: Path, entry: dict[str, Any], found: ShardCheck) -> Table | None:
    """The columns of a shard's offset index, None where there is nothing to go by."""
    name = sidecar_name(entry["name"])
    try:
        raw = (folder / name).read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
            found.fault(f"the sha256 of its {name} is not the one in {INDEX}")
        values = json.loads(raw)
        table = {column: list(values[column]) for column in COLUMNS}
        texts = all(isinstance(value, str) for column in COLUMNS[:2] for value in table[column])
        counts = all(_is_count(value) for column in COLUMNS[2:] for value in table[column])
        if not texts or not counts or {len(column) for column in table.values()} != {entry["samples"]}:
            raise ValueError(f"no table of {entry['samples']} samples")
    except OSError as error:
        found.fault(f"its {name} cannot be read: {error.strerror}")
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found.fault(f"its {name} is damaged: {error!r}")
        return None
    return table


def _check_samples(file: BinaryIO, table: Table, facts: SetFacts, found: ShardCheck) -> None:
    """Walks through a tar from its first byte to its last, by the headers; after a fault it goes on where the offset index says."""
    place, found.samples = 0, len(table["key"])
    found.keys = np.array([key_hash(key) for key in table["key"]], np.uint64)
    begins = [offset - BLOCK for offset in table["offset"]][1:] + [-1]
    for row, key in enumerate(table["key"]):
        try:
            members, place = read_members(file, place, key)
            _check_payload(members[0], table, row)
            content = [(member.extension, member.payload) for member in members]
            check_sample(key, content, facts, table["frames"][row], table["label"][row], table["sums"][row])
        except (BadTar, BadSample) as error:
            found.fault(str(error), key)
            place = begins[row]
            if place < 0:
                return
    try:
        read_end(file, place)
    except BadTar as error:
        found.fault(str(error))


def _check_payload(member: Member, table: Table, row: int) -> None:
    told, found = (table["nbytes"][row], table["offset"][row]), (len(member.payload), member.offset)
    if told != found:
        raise BadSample(f"{found[0]} bytes at byte {found[1]}, its offset index says {told[0]} at {told[1]}")
    if zlib.crc32(member.payload) != table["crc32"][row]:
        raise BadSample("its bytes are damaged (crc32)")


def key_hash(key: str) -> int:
    """64 bits that tell keys apart."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def _check_whole(folder: Path, index: dict[str, Any], keys: list[np.ndarray]) -> ShardCheck:
    """What only shows over all shards: the number of samples, rows that are left out, keys that come twice."""
    found = ShardCheck(INDEX)
    samples = {entry["name"]: entry["samples"] for entry in index["shards"]}
    dropped = index.get("dropped", {})
    if len(samples) != len(index["shards"]):
        found.fault("a shard is listed twice")
    for name, rows in dropped.items():
        if not all(_is_count(row) and row < samples.get(name, 0) for row in rows) or len(set(rows)) != len(rows):
            found.fault(f"the rows to leave out of {name} are not rows of that shard")
    total = sum(samples.values()) - sum(map(len, dropped.values()))
    if index["samples"] != total:
        found.fault(f"it says {index['samples']} samples, its shards have {total}")
    values, counts = np.unique(np.concatenate(keys), return_counts=True) if keys else (np.empty(0), np.empty(0))
    repeated = set(values[counts > 1].tolist())
    for entry in index["shards"] if repeated else ():
        for key in json.loads((folder / sidecar_name(entry["name"])).read_bytes())["key"]:
            if key_hash(key) in repeated:
                found.faults.append(Fault(entry["name"], key, "its key comes more than once in the set"))
    return found
