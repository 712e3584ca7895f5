"""The offset indices beside the tars: fetched, checked against index.json, and put together."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from datasets.storage import MissingFile, Storage
from datasets.tables import MAX_SIDECAR_BYTES, Table, read_table
from utils.errors import UserError

INDEX = "index.json"
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading a damaged index can raise."""
BLANK = "no offset index"
READERS = 16
"""Offset indices of a remote set that are fetched at the same time."""


def sidecar_name(shard: str) -> str:
    """Name of the offset index of a shard."""
    return Path(shard).stem + ".index.json"


def read_tables(storage: Storage, meta: dict[str, Any], bad: dict[int, str], on_bad: str) -> Iterator[Table]:
    """The offset index of each shard in turn, after a look at the tar's size where that costs nothing. Shards that
    are wrong raise UserError, or are noted in `bad` when `on_bad` is "skip"."""

    def read(number: int) -> Table:
        entry = meta["shards"][number]
        try:
            _check_tar(storage, entry)
        except UserError as error:
            if on_bad == "fail":
                raise
            bad[number] = str(error)
        try:
            return _read_sidecar(storage, meta, entry)
        except UserError as error:
            if on_bad == "fail":
                raise
            bad[number] = f"{BLANK}: {error}"
            return Table.blank(entry["samples"])

    with ThreadPoolExecutor(READERS if storage.capacity is not None else 1) as pool:
        try:
            yield from pool.map(read, range(len(meta["shards"])))
        finally:
            pool.shutdown(cancel_futures=True)


def _check_tar(storage: Storage, entry: dict[str, Any]) -> None:
    try:
        size = storage.size(entry["name"])
    except MissingFile as error:
        raise UserError(f"shard set {storage.describe()} is incomplete: {error}; copy it again or rerun preprocess.py") from None
    if size not in (None, entry["bytes"]):
        shard = storage.describe(entry["name"])
        raise UserError(f"{shard} has {size} bytes, {INDEX} says {entry['bytes']}: it is damaged; copy it again or rerun preprocess.py")


def _read_sidecar(storage: Storage, meta: dict[str, Any], entry: dict[str, Any]) -> Table:
    name = sidecar_name(entry["name"])
    try:
        return read_table(storage.read(name, MAX_SIDECAR_BYTES, entry["index_sha256"]), meta, entry)
    except MissingFile as error:
        raise UserError(f"shard set {storage.describe()} is incomplete: {error}; copy it again or rerun preprocess.py") from None
    except DAMAGE as error:
        raise UserError(f"{storage.describe(name)} is damaged ({one_line(error)}): copy the set again or rerun preprocess.py") from None


def kept_rows(meta: dict[str, Any], counts: list[int], storage: Storage) -> np.ndarray | None:
    """Rows that index.json does not drop (near duplicates found after the shards were written); None: all."""
    dropped = meta.get("dropped") or {}
    if not any(dropped.values()):
        return None
    kept = np.ones(sum(counts), dtype=bool)
    first = dict(zip((entry["name"] for entry in meta["shards"]), np.cumsum([0, *counts]).tolist(), strict=False))
    count = dict(zip(first, counts, strict=True))
    for name, rows in dropped.items():
        if not all(type(row) is int and 0 <= row < count[name] for row in rows):
            raise UserError(f"{storage.describe(INDEX)} is damaged (dropped rows of {name}): copy the set again or rerun preprocess.py")
        kept[[first[name] + row for row in rows]] = False
    return kept


def one_line(error: Exception) -> str:
    """An error as one line of bounded length; of a KeyError, what is missing."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:200]
