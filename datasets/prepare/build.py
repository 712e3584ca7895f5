"""Source videos -> shard set: the videos are cut into parts, tasks make the parts, whoever finds them all made writes index.json.

What a set holds depends on the list of videos, the rules and the number of parts only: not on the number of tasks, machines and
workers, on the order in which they come, or on restarts.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets.prepare.clips import MP4_CRF, ClipRules
from datasets.prepare.copies import Copies
from datasets.prepare.parts import WORK, Cut, Part, cut_parts, finishing, locked, make_part
from datasets.prepare.report import Tally, write_report
from datasets.prepare.sheet import write_sheet
from datasets.prepare.writer import dump_json, remove_unfinished
from datasets.shards import FORMAT, INDEX, SCHEMA, sidecar_name
from datasets.sources.base import Listing
from utils.errors import UserError
from utils.files import atomic_write_bytes


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
    dedupe: int | None = None
    """Distance of fingerprints up to which a clip is a duplicate of one of another video, and left out; None: all are kept."""
    parts: int = 1
    """Parts that are made independently of each other."""

    @property
    def cut(self) -> Cut:
        return Cut(self.shard_samples, self.shard_bytes, self.dedupe)


@dataclass(frozen=True)
class Task:
    """Which parts are made here: of `count` tasks, number `index` makes the parts index, index + count, ..."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a call of `build`."""

    made: Tally
    """Counts of this task's parts."""
    missing: int = 0
    """Parts that other tasks have not finished yet; 0: the set is complete."""
    was_complete: bool = False


Progress = Callable[[int, Tally], None]


def build(
    listing: Listing, rules: ClipRules, info: SetInfo, out: Path, *, workers: int, progress: Progress, task: Task | None = None
) -> Outcome:
    """Makes this task's parts of the shard set, going on after what is there. `progress` hears (videos done, counts) after each video.

    The task that finds all parts made writes report, contact sheet and index. UserError when `out` holds another set, a part is being
    made by another process, `out` cannot be written, or no clip comes out.
    """
    plan = plan_digest(listing, rules, info)
    task, made = task or Task(), Tally()
    try:
        if was_complete := _complete(out, plan):
            missing = 0
        else:
            _claim(out, plan, info.parts)
            parts = cut_parts(out, len(listing.videos), info.parts)
            _make_parts(parts[task.index :: task.count], listing, rules, info, workers, progress, made)
            missing = _finish(parts, listing, rules, info, out, plan)
    except OSError as error:
        if not (isinstance(error, FileNotFoundError) and _complete(out, plan)):
            why = error.strerror or error
            raise UserError(f"cannot write to {out}: {why}; mend that and run the same command again, it goes on") from None
        missing, was_complete = 0, False  # another task found all parts made, and has taken the work folder away
    if not missing:
        shutil.rmtree(out / WORK, ignore_errors=True)
    return Outcome(made, missing, was_complete)


def plan_digest(listing: Listing, rules: ClipRules, info: SetInfo) -> str:
    """Hash of all that decides the content of the set: sources with their sizes, rules, and how shards are cut."""
    digest = hashlib.sha256(dump_json([SCHEMA, listing.classes, listing.missing, listing.rejected, asdict(rules), asdict(info)]))
    for video in listing.videos:
        digest.update(dump_json([video.name, video.label, video.caption, video.fps, video.content_id()]))
        if video.embedding is not None:
            digest.update(dump_json([video.embedding.form.to_meta(), video.embedding.content_id()]))
    return digest.hexdigest()


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


def _claim(out: Path, plan: str, parts: int) -> None:
    """Notes the plan, or checks that the unfinished set has the same one. Several tasks may do so at the same time."""
    (out / WORK).mkdir(parents=True, exist_ok=True)
    noted = out / WORK / "plan"
    # In this order: shards of this set appear after its plan.
    foreign = next(out.glob("shard-*"), None) is not None
    if not noted.exists():
        if foreign and not (out / INDEX).exists():
            raise UserError(f"{out} holds shards that another program or version left: choose another --out, or --overwrite")
        mine = noted.with_name(f"plan-{os.uname().nodename}-{os.getpid()}")
        atomic_write_bytes(mine, dump_json({"plan": plan, "parts": parts}))
        with suppress(FileExistsError):
            os.link(mine, noted)  # unlike a renaming it never replaces the plan of a task that was faster
        mine.unlink()
    try:
        found = json.loads(noted.read_bytes())
        other_parts = found["parts"] if found["parts"] != parts else 0
    except (ValueError, KeyError, TypeError):
        found, other_parts = {"plan": ""}, 0
    if other_parts:
        raise UserError(f"{out} holds an unfinished set in {other_parts} parts, not {parts}: say --parts {other_parts} to go on with it")
    if found["plan"] != plan:
        raise UserError(f"{out} holds an unfinished set of other videos or with other settings: choose another --out, or --overwrite")


def _make_parts(
    parts: list[Part], listing: Listing, rules: ClipRules, info: SetInfo, workers: int, progress: Progress, made: Tally
) -> None:
    before = 0

    def advance(videos: int, tally: Tally) -> None:
        progress(before + videos, tally)

    for part in parts:
        with locked(part):
            done = part.done()
            if done is not None:
                made.add(Tally.from_dict(done["tally"]))
            elif not (part.out / INDEX).exists():  # else another task found all parts made, and has taken the marker away
                made.add(make_part(part, listing, rules, info.cut, workers, advance))
        before += part.last - part.first
        progress(before, made)


def _finish(parts: list[Part], listing: Listing, rules: ClipRules, info: SetInfo, out: Path, plan: str) -> int:
    """Writes what stands over the shards, once all parts are made. Returns how many are not."""
    with finishing(out):
        waiting = sum(not part.marked for part in parts)
        made = [] if waiting else [done for part in parts if (done := part.done()) is not None]
        if (out / INDEX).exists():
            return 0
        if len(made) < len(parts):
            return waiting or len(parts) - len(made)
        entries, total = [entry for part in made for entry in part["entries"]], Tally()
        for part in made:
            total.add(Tally.from_dict(part["tally"]))
        total.skipped += [(name, "missing", "named in the list, not in the folder") for name in listing.missing] + listing.rejected
        dropped = _dropped(out, entries, info, total)
        count = sum(map(len, dropped.values()))
        write_report(out, total, listing, count)
        if not total.clips:
            reasons = Counter(reason for _, reason, _ in total.skipped)
            reasons += total.rejected
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise UserError(f"no clip could be made of {len(listing.videos)} videos ({why}): see {out / 'report.json'}")
        write_sheet(out, entries, rules.codec, listing.classes)
        remove_unfinished(out)
        atomic_write_bytes(out / INDEX, _index(listing, rules, info, entries, total, plan, dropped))
    return 0


def _dropped(out: Path, entries: list[dict[str, Any]], info: SetInfo, total: Tally) -> dict[str, list[int]]:
    """Shard -> rows of the clips that repeat one of another part, counted in `total`; those of the same part were never stored."""
    if info.dedupe is None or info.parts == 1:
        return {}
    copies, dropped = Copies(info.dedupe), {}
    for entry in entries:
        table = json.loads((out / sidecar_name(entry["name"])).read_bytes())
        clips = zip(table["key"], table["progress"]["fingerprints"], strict=True)
        rows = [row for row, (key, fingerprint) in enumerate(clips) if copies.is_copy(key, fingerprint)]
        for row in rows:
            total.count_left_out(f"clip {table['key'][row]}", "duplicate of a clip in another part", f"row {row} of {entry['name']}")
        if rows:
            dropped[entry["name"]] = rows
    return dropped


def _index(
    listing: Listing,
    rules: ClipRules,
    info: SetInfo,
    shards: list[dict[str, Any]],
    total: Tally,
    plan: str,
    dropped: dict[str, list[int]],
) -> bytes:
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
        "samples": total.clips - sum(map(len, dropped.values())),
        "videos": total.videos,
        "plan": plan,
        "shards": shards,
        "dropped": dropped,
        **(listing.cond.to_meta() if listing.cond else {}),
    }
    return json.dumps(index, indent=1, sort_keys=True).encode() + b"\n"
