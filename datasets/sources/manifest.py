"""A manifest: one row a video, or a part of one, in a CSV, TSV, JSONL or Parquet file."""

import logging
import math
import posixpath
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets.sources.base import MAX_LABEL, Listing, SourceOptions, Video, class_names
from datasets.sources.captions import check_caption
from datasets.sources.splits import SPLITS, folder_split
from datasets.sources.tables import TABLES, Row, read_table
from utils.errors import UserError

COLUMNS = ("path", "start", "end", "caption", "label", "split", "fps", "group", "embedding")
SHOWN = 5
"""Bad rows that the error names in full."""
_log = logging.getLogger(__name__)


class ManifestSource:
    """Columns path (relative to the manifest), start, end (seconds), caption, label (number or name), split, fps (of frame folders),
    group (videos that must not be parted between splits; default: the rows of one path), embedding (a npy file: the condition vector).
    All but path may be left out or empty.
    """

    name = "manifest"
    endings = " ".join(TABLES)
    summary = f"a file ending in {endings} with columns path, start, end, caption, label, split, fps, group, embedding; path is enough"
    kind: Literal["videos", "frames"] = "videos"
    honours: frozenset[str] = frozenset()

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """A file with the ending of a table."""
        return root.is_file() and root.suffix.lower() in TABLES

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All rows in order; `missing` holds paths that are not there. UserError that names the bad rows by their line."""
        if not self.matches(root, options):
            raise UserError(f"{root} is no manifest: it should be a file ending in {self.endings}")
        reader = _Reader(root)
        for where, row in read_table(root):
            reader.add(where, row)
        return reader.listing(options)


@dataclass(slots=True)
class _Entry:
    video: Video
    label: str
    where: str
    is_here: bool


class _Reader:
    """Checks rows as they come, and knows all in the end."""

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        self.entries: list[_Entry] = []
        self.bad: list[str] = []
        self.first: dict[str, str] = {}
        """Name -> the line that has it."""
        self.split_of: dict[str, tuple[str, str]] = {}
        """Group -> (its split, the line that says so)."""
        self.paths: dict[str, tuple[Path, str]] = {}
        """Path as written -> (path, file or folder, or empty where it is missing): rows of one file share it."""
        self.ignored: dict[str, None] = {}

    def add(self, where: str, row: Row) -> None:
        """Takes a row, or notes why it is bad."""
        self.ignored.update(dict.fromkeys(str(column) for column in row if column not in COLUMNS))
        try:
            entry = self._entry(where, {column: _value(row.get(column)) for column in COLUMNS})
        except ValueError as error:
            self.bad.append(f"{where}: {error}")
        else:
            self.entries.append(entry)

    def _entry(self, where: str, row: Row) -> _Entry:
        name = _path(row["path"])
        if name not in self.paths:
            path = self.manifest.parent / name
            self.paths[name] = path, "folder" if path.is_dir() else "file" if path.is_file() else ""
        path, kind = self.paths[name]
        is_frames = kind == "folder"
        span, fps = _span(row), _seconds(row, "fps", 0.0)
        if span and is_frames:
            raise ValueError(f"start and end of {name}: it is a folder of frames, they are for video files")
        if not math.isfinite(fps):
            raise ValueError("fps is not finite")
        group, split = _text(row, "group") or name, _split(row)
        name += f"@{_number(span[0])}-{_number(span[1])}" if span else ""
        first = self.first.setdefault(name, where)
        if first != where:
            raise ValueError(f"repeats {first} ({name})")
        known, line = self.split_of.setdefault(group, (split, where))
        if known != split:
            raise ValueError(f"{group} is in split {split or '(none)'} here and in {known or '(none)'} on {line}")
        video = Video(
            path,
            name,
            caption=check_caption(_text(row, "caption")),
            is_frames=is_frames,
            span=span,
            group=group,
            split=split,
            fps=fps if is_frames else 0.0,
            vector=self._vector(row["embedding"]),
        )
        return _Entry(video, _label(row["label"]), where, bool(kind))

    def _vector(self, value: Any) -> Path | None:
        if value is None:
            return None
        path = self.manifest.parent / _path(value)
        if not path.is_file():
            raise ValueError(f"there is no embedding {value!s:.200}")
        return path

    def listing(self, options: SourceOptions) -> Listing:
        """The rows as videos. UserError when one is bad, or only some have a label."""
        unlabelled = [entry.where for entry in self.entries if not entry.label]
        if unlabelled and len(unlabelled) < len(self.entries):
            self.bad += [f"{where}: no label, other rows have one" for where in unlabelled]
        if self.bad:
            more = f"; and {len(self.bad) - SHOWN} more bad rows" if len(self.bad) > SHOWN else ""
            raise UserError(f"{self.manifest} {'; '.join(self.bad[:SHOWN])}{more}")
        if self.ignored:
            _log.warning("%s: ignoring the columns %s", self.manifest, ", ".join(self.ignored))
        classes = [] if unlabelled else class_names(entry.label for entry in self.entries)
        index = {name: number for number, name in enumerate(classes)}
        wanted = {"", options.split, "train" if options.val_fraction else ""}
        gone = [entry.video for entry in self.entries if not entry.is_here]
        missing = [video.name for video in gone if options.split == "all" or video.split in wanted]
        videos = [replace(entry.video, label=index.get(entry.label, 0)) for entry in self.entries if entry.is_here]
        return Listing(videos, classes, missing)


def _value(value: Any) -> Any:
    """None for what is left empty: nothing, blank text, or the NaN of tables that have no other word for it."""
    empty = (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))
    return None if empty else value


def _text(row: Row, column: str) -> str:
    value = row[column]
    return "" if value is None else _utf8(column, value)


def _utf8(column: str, value: Any) -> str:
    if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise ValueError(f"{column} {value!r:.60} is not text")
    return value.strip()


def _path(value: Any) -> str:
    """A path with slashes and without detours, as written: relative to the manifest, or absolute."""
    if value is None:
        raise ValueError("no path")
    path = _utf8("path", value)
    if "\0" in path or "://" in path:
        raise ValueError(f"path {path!r:.60} is no path of a file; videos elsewhere have to be fetched first")
    return posixpath.normpath(path)


def _seconds(row: Row, column: str, default: float) -> float:
    value = row[column]
    if value is None:
        return default
    try:
        number = math.nan if isinstance(value, bool) else round(float(value), 6)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number >= 0:
        raise ValueError(f"{column} {value!r:.60} is not a number of at least 0")
    return number


def _span(row: Row) -> tuple[float, float] | None:
    start, end = _seconds(row, "start", 0.0), _seconds(row, "end", math.inf)
    if not start < end:
        raise ValueError(f"start {_number(start)} is not before end {_number(end)}")
    return None if (start, end) == (0.0, math.inf) else (start, end)


def _number(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".") if math.isfinite(seconds) else "inf"


def _split(row: Row) -> str:
    split = _text(row, "split")
    if split and not folder_split(split):
        raise ValueError(f"split {split!r:.60} is none of {', '.join(SPLITS[1:])}")
    return folder_split(split)


def _label(value: Any) -> str:
    """A class name, or the digits of a class number; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _utf8("label", value)
    if re.fullmatch("-[0-9]+", text):
        raise ValueError(f"label {text:.20} is below 0; leave the label empty in all rows when there are no classes")
    if re.fullmatch("[0-9]+", text):
        text = text.lstrip("0") or "0"
        if len(text) > len(str(MAX_LABEL)) or int(text) > MAX_LABEL:
            raise ValueError(f"label {text:.20} is above {MAX_LABEL}: give names")
    return text
