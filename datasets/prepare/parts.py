"""One part of a shard set: the shards of a contiguous run of the videos, made by one process at a time, in one fixed order.

A finished shard notes where the next one begins, so after a kill at any moment the same call goes on there and ends with the same
bytes. A part that is whole leaves a marker with its rows of index.json and its counts.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.prepare.clips import ClipRules, Facts
from datasets.prepare.copies import Copies
from datasets.prepare.report import Tally
from datasets.prepare.workers import Prepared, prepare_all, read_spool
from datasets.prepare.writer import Sample, ShardWriter, dump_json, finished_shard, remove_shards, shard_entry, shard_name
from datasets.sources.base import Listing
from utils.errors import UserError
from utils.files import atomic_write_bytes

WORK = ".work"
COPY = "duplicate of a clip of another video"


@dataclass(frozen=True)
class Cut:
    """Where a shard ends, and which clips are copies of others."""

    shard_samples: int = 512
    shard_bytes: int = 1 << 30
    dedupe: int | None = None
    """Largest distance of the fingerprints of two clips of different videos that count as one; None: all clips are kept."""


@dataclass(frozen=True)
class Part:
    """Videos [first, last) of the list. `number` is None where the set has one part only."""

    out: Path
    number: int | None
    first: int
    last: int

    @property
    def folder(self) -> Path:
        """Where the lock, the spool files and the marker of this part lie."""
        return self.out / WORK / f"part-{self.number or 0:04d}"

    def shard(self, number: int) -> str:
        """File name of a shard of this part."""
        return shard_name(number, self.number)

    @property
    def marked(self) -> bool:
        """Whether the part was made; `done` looks closer."""
        return (self.folder / "done").exists()

    def done(self) -> dict[str, Any] | None:
        """`entries` (rows of index.json) and `tally` of a part that is whole and still has all its bytes, else None."""
        try:
            done = json.loads((self.folder / "done").read_bytes())
            sizes = [(self.out / entry["name"]).stat().st_size for entry in done["entries"]]
            return done if sizes == [entry["bytes"] for entry in done["entries"]] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def cut_parts(out: Path, videos: int, count: int) -> list[Part]:
    """`count` parts of nearly equal size of a list of `videos`."""
    edges = [videos * i // count for i in range(count + 1)]
    return [Part(out, i if count > 1 else None, edges[i], edges[i + 1]) for i in range(count)]


@contextmanager
def locked(part: Part) -> Iterator[None]:
    """Holds a part for this process; the lock goes with the process, however it ends. UserError when another one holds it."""
    part.folder.mkdir(parents=True, exist_ok=True)
    with held(part.folder / "lock", str(part.out) if part.number is None else f"part {part.number} of {part.out}"):
        yield


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Holds a lock file. UserError that names `what` when another process holds it."""
    with path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another preprocess.py is writing {what}: wait for it, or end it first") from None
        except OSError as error:
            # A cluster's file system may have no locks. Tasks of one array have different parts: they need none.
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield


@contextmanager
def finishing(out: Path) -> Iterator[None]:
    """One process after the other. Without locks on the file system two may do the same work, with the same bytes."""
    (out / WORK).mkdir(exist_ok=True)
    with (out / WORK / "finish").open("wb") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_part(part: Part, listing: Listing, rules: ClipRules, cut: Cut, workers: int, progress: Callable[[int, Tally], None]) -> Tally:
    """Makes what is missing of a part. `progress` hears (videos done of this part, its counts) after each video."""
    # A killed run's workers may live for a moment and write into the old folder: it goes, and theirs fail with it.
    for old in part.folder.glob("spool-*"):
        shutil.rmtree(old, ignore_errors=True)
    spools = part.folder / f"spool-{os.getpid()}"
    spools.mkdir()
    writer = _PartWriter(part, cut)
    progress(writer.first_video - part.first, writer.total)
    try:
        numbers, compared = range(writer.first_video, part.last), cut.dedupe is not None
        jobs = prepare_all(listing.videos, numbers, rules, listing.classes, spools, workers, compared)
        for number, prepared, spool in jobs:
            writer.add_video(number, listing.videos[number].name, prepared, spool)
            spool.unlink(missing_ok=True)
            progress(number + 1 - part.first, writer.total)
        total = writer.finish()
    finally:
        writer.abandon()
        shutil.rmtree(spools, ignore_errors=True)
    atomic_write_bytes(part.folder / "done", dump_json({"entries": writer.entries, "tally": total.to_dict()}))
    return total


class _PartWriter:
    """Puts clips into shards as they come, closes a shard when it is full, and begins after the shards that are whole already."""

    def __init__(self, part: Part, cut: Cut) -> None:
        self.part, self.cut = part, cut
        self.entries: list[dict[str, Any]] = []
        """The finished shards' rows of index.json."""
        self.total, self.tally = Tally(), Tally()
        self.copies = None if cut.dedupe is None else Copies(cut.dedupe)
        self.fingerprints: list[str] = []
        self.shard: ShardWriter | None = None
        self.first_video, self.first_clip, self.kept = part.first, 0, 0
        while (table := finished_shard(part.out, part.shard(len(self.entries)))) is not None:
            self._finished(table)
            self.first_video, self.first_clip, self.kept = table["progress"]["next"]
            if self.copies:
                self.copies.note(zip(table["key"], table["progress"]["fingerprints"], strict=True))
        remove_shards(part.out, len(self.entries), part.number)

    def _finished(self, table: dict[str, Any]) -> None:
        self.entries.append(shard_entry(self.part.out, self.part.shard(len(self.entries)), table))
        self.total.add(Tally.from_dict(table["progress"]["tally"]))

    def add_video(self, number: int, name: str, prepared: Prepared, spool: Path) -> None:
        """The clips of the next video; those of finished shards are passed over."""
        for clip, (sample, facts) in enumerate(read_spool(prepared, spool)):
            if (number, clip) < (self.first_video, self.first_clip):
                continue
            if self.copies and self.copies.is_copy(sample.key, facts.fingerprint):
                self.tally.count_left_out(name, COPY, f"clip {sample.key}")
                continue
            self.kept += 1
            self._add(number, clip, sample, facts)
        if prepared.skipped:
            self.tally.skipped.append(prepared.skipped)
        else:
            for rejection in prepared.rejected:
                self.tally.count_left_out(name, rejection.reason, rejection.detail)
            self.tally.count_video([facts for _, _, facts in prepared.rows], self.kept)
            if not self.kept:
                self.tally.skipped.append((name, COPY, f"all its {len(prepared.rows)} clips"))
        self.kept = 0

    def _add(self, video: int, clip: int, sample: Sample, facts: Facts) -> None:
        if self.shard is None:
            self.shard = ShardWriter(self.part.out, self.part.shard(len(self.entries)))
        self.shard.add(sample)
        self.fingerprints.append(facts.fingerprint)
        self.tally.count_clip(sample.label, facts)
        if self.shard.samples >= self.cut.shard_samples or self.shard.nbytes >= self.cut.shard_bytes:
            self._close(video, clip + 1)

    def _close(self, video: int, clip: int) -> None:
        assert self.shard is not None
        progress: dict[str, Any] = {"next": [video, clip, self.kept], "tally": self.tally.to_dict()}
        if self.copies:
            progress["fingerprints"] = self.fingerprints
        self._finished(self.shard.close(progress))
        self.tally, self.shard, self.fingerprints = Tally(), None, []

    def finish(self) -> Tally:
        """Closes the last shard. Returns the counts of the part."""
        if self.shard is not None:
            self._close(self.part.last, 0)
        self.total.add(self.tally)
        return self.total

    def abandon(self) -> None:
        """Leaves no half-written shard behind."""
        if self.shard is not None:
            self.shard.abandon()
