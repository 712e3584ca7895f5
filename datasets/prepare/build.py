"""Source videos -> shard set: workers prepare clips in parallel, one writer puts them into shards in a fixed order.

What a shard holds depends on the list of videos and the rules only, not on the number of workers or on restarts: a finished shard
notes where the next one begins, so after a kill at any moment the same call goes on there and ends with the same bytes.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets.prepare.clips import MP4_CRF, ClipRules
from datasets.prepare.report import Tally, read_report, write_report
from datasets.prepare.workers import prepare_all, read_spool
from datasets.prepare.writer import Sample, ShardWriter, dump_json, finished_shard, remove_set, shard_entry
from datasets.shards import FORMAT, INDEX, SCHEMA
from datasets.sources.base import Listing, Video
from utils.errors import UserError
from utils.files import atomic_write_bytes

WORK = ".work"


@dataclass(frozen=True)
class SetInfo:
    """What index.json says about the set beside the rules, and how shards are cut."""

    name: str
    source: str
    licence: str = ""
    split: str = "all"
    seed: int = 0
    shard_samples: int = 512
    shard_bytes: int = 1 << 30


def build(listing: Listing, rules: ClipRules, info: SetInfo, out: Path, *, workers: int, progress: Callable[[int, Tally], None]) -> Tally:
    """Writes the shard set, going on after the finished shards that are there. `progress` hears (videos done, counts) after each video.

    Returns the counts, at once when the set is complete. UserError when `out` holds another set, is being written by another
    process, cannot be written, or no clip comes out.
    """
    plan = plan_digest(listing, rules, info)
    try:
        if _complete(out, plan):
            tally = read_report(out)
        else:
            (out / WORK).mkdir(parents=True, exist_ok=True)
            with _locked(out):
                tally = _build(listing, rules, info, out, plan, workers, progress)
        shutil.rmtree(out / WORK, ignore_errors=True)
        return tally
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; mend that and run the same command again, it goes on") from None


def plan_digest(listing: Listing, rules: ClipRules, info: SetInfo) -> str:
    """Hash of all that decides the content of the set: sources with their sizes, rules, and how shards are cut."""
    sources = [(video.name, video.label, video.caption, _source_size(video)) for video in listing.videos]
    return hashlib.sha256(dump_json([SCHEMA, sources, listing.classes, listing.missing, asdict(rules), asdict(info)])).hexdigest()


def _source_size(video: Video) -> int:
    return sum(1 for _ in video.path.iterdir()) if video.is_frames else video.path.stat().st_size


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the folder for this process; the lock goes with the process, however it ends."""
    with (out / WORK / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another preprocess.py is writing to {out}") from None
        yield


def _complete(out: Path, plan: str) -> bool:
    if not (out / INDEX).exists():
        return False
    try:
        same = json.loads((out / INDEX).read_bytes())["plan"] == plan
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{out} holds a shard set made of other videos or with other settings: choose another --out, or --overwrite")
    return True


def _build(
    listing: Listing, rules: ClipRules, info: SetInfo, out: Path, plan: str, workers: int, progress: Callable[[int, Tally], None]
) -> Tally:
    spools = _claim(out, plan)
    writer = _SetWriter(out, info)
    progress(writer.first_video, writer.total)
    for number, prepared, spool in prepare_all(listing.videos, writer.first_video, rules, listing.classes, spools, workers):
        for clip, (sample, facts) in enumerate(read_spool(prepared, spool)):
            writer.add(number, clip, sample, facts.fps)
        spool.unlink()
        if prepared.skipped:
            writer.part.skipped.append(prepared.skipped)
        progress(number + 1, writer.total)
    total = writer.finish(len(listing.videos))
    total.skipped += [(name, "missing", "named in the list, not in the folder") for name in listing.missing]
    write_report(out, total, listing)
    if not total.clips:
        reasons = Counter(reason for _, reason, _ in total.skipped)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise UserError(f"no clip could be made of {len(listing.videos)} videos ({why}): see {out / 'report.json'}")
    atomic_write_bytes(out / INDEX, _index(listing, rules, info, writer.entries, total, plan))
    return total


def _claim(out: Path, plan: str) -> Path:
    """Notes the plan, or checks that the unfinished set has the same one. Returns an empty folder for this process's spool files."""
    noted = out / WORK / "plan"
    if not noted.exists():
        if next(out.glob("shard-*"), None):
            raise UserError(f"{out} holds shards that another program or version left: choose another --out, or --overwrite")
        atomic_write_bytes(noted, plan.encode())
    elif noted.read_text() != plan:
        raise UserError(f"{out} holds an unfinished set of other videos or with other settings: choose another --out, or --overwrite")
    # A killed run's workers may live for a moment and write into the old folder: it goes, and theirs fail with it.
    for old in (out / WORK).glob("spool-*"):
        shutil.rmtree(old, ignore_errors=True)
    spools = out / WORK / f"spool-{os.getpid()}"
    spools.mkdir()
    return spools


class _SetWriter:
    """Puts clips into shards as they come, closes a shard when it is full, and begins after the shards that are whole already."""

    def __init__(self, out: Path, info: SetInfo) -> None:
        self.out, self.info = out, info
        self.entries: list[dict[str, Any]] = []
        """The finished shards' rows of index.json."""
        self.total, self.part = Tally(), Tally()
        self.shard: ShardWriter | None = None
        self.first_video = self.first_clip = 0
        while (table := finished_shard(out, len(self.entries))) is not None:
            self._finished(table)
            self.first_video, self.first_clip = table["progress"]["next"]
        remove_set(out, keep=len(self.entries))

    def _finished(self, table: dict[str, Any]) -> None:
        self.entries.append(shard_entry(self.out, len(self.entries), table))
        self.total.add(Tally.from_dict(table["progress"]["tally"]))

    def add(self, video: int, clip: int, sample: Sample, fps: float) -> None:
        """The next clip in order of (video, clip); those of finished shards are passed over."""
        if (video, clip) < (self.first_video, self.first_clip):
            return
        if self.shard is None:
            self.shard = ShardWriter(self.out, len(self.entries))
        self.shard.add(sample)
        self.part.add(Tally(int(clip == 0), 1, Counter({str(fps): 1}), Counter({str(sample.label): 1})))
        if self.shard.samples >= self.info.shard_samples or self.shard.nbytes >= self.info.shard_bytes:
            self._close(video, clip + 1)

    def _close(self, video: int, clip: int) -> None:
        assert self.shard is not None
        self._finished(self.shard.close({"next": [video, clip], "tally": self.part.to_dict()}))
        self.part, self.shard = Tally(), None

    def finish(self, videos: int) -> Tally:
        """Closes the last shard. Returns the counts of the whole set."""
        if self.shard is not None:
            self._close(videos, 0)
        self.total.add(self.part)
        return self.total


def _index(listing: Listing, rules: ClipRules, info: SetInfo, shards: list[dict[str, Any]], total: Tally, plan: str) -> bytes:
    codec: dict[str, Any] = {"name": rules.codec}
    if rules.codec == "mp4":
        codec |= {"encoder": "libx264", "crf": MP4_CRF, "pixels": "yuv420p", "tune": "fastdecode"}
    index = {
        "format": FORMAT,
        "schema": SCHEMA,
        **{key: value for key, value in asdict(info).items() if key not in ("shard_samples", "shard_bytes")},
        "classes": listing.classes,
        "clip_length": rules.clip_length,
        "fps": total.common_fps,
        "size": rules.size,
        "codec": codec,
        "transform": {key: value for key, value in asdict(rules).items() if key not in ("codec", "size", "clip_length")},
        "samples": total.clips,
        "videos": total.videos,
        "plan": plan,
        "shards": shards,
    }
    return json.dumps(index, indent=1, sort_keys=True).encode() + b"\n"
