"""Captions of video files: a text file beside each, or one table for all."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.sources.base import SourceOptions, Video, relative, walk
from datasets.sources.tables import TABLES, read_table
from utils.errors import UserError

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 30
NAME_COLUMNS = ("path", "name", "file", "video")
TEXT_COLUMNS = ("caption", "text")
_log = logging.getLogger(__name__)


def with_captions(videos: list[Video], root: Path, options: SourceOptions, table: Path | None = None) -> list[Video]:
    """The videos with captions: of `options.captions`, else of `table`, else of `<name>.txt` beside each. Captions are stripped.

    UserError for a table that cannot be read or names no video here; names that are not here are counted in one log line.
    """
    table = options.captions or table
    return _by_table(videos, table, root) if table else _beside(videos, root, options.exclude)


def _beside(videos: list[Video], root: Path, exclude: Path | None) -> list[Video]:
    texts = {relative(path.with_suffix(""), root): path for path in walk(root, frozenset({".txt"}), exclude)} if videos else {}
    stems = ["" if video.is_frames else relative(video.path.with_suffix(""), root) for video in videos]
    return [
        replace(video, caption=read_caption(texts[stem])) if stem in texts else video for video, stem in zip(videos, stems, strict=True)
    ]


def read_caption(path: Path) -> str:
    """The text of a small file. UserError when it is too large or not UTF-8."""
    try:
        with path.open("rb") as file:
            return decode_caption(file.read(MAX_CAPTION_BYTES + 1))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def decode_caption(text: bytes) -> str:
    """A caption of UTF-8 bytes, stripped. ValueError when it is longer than MAX_CAPTION_BYTES or not UTF-8."""
    if len(text) > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption of more than {MAX_CAPTION_BYTES >> 10} KiB")
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8") from None


def check_caption(text: str) -> str:
    """A caption, stripped. ValueError when it is longer than MAX_CAPTION_BYTES, or cannot be written as UTF-8."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("the caption is not UTF-8") from None
    if size > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption of more than {MAX_CAPTION_BYTES >> 10} KiB")
    return text.strip()


def _by_table(videos: list[Video], table: Path, root: Path) -> list[Video]:
    captions: dict[str, str] = {}
    for where, name, caption in _entries(table):
        if captions.setdefault(name, caption) != caption:
            raise UserError(f"{table} {where}: a second caption of {name}")
    used, found = set(), []
    for video in videos:
        stem, _, suffix = video.name.rpartition(".")
        names = [video.name, stem if stem and "/" not in suffix else video.name]
        names += [name.rpartition("/")[2] for name in names]
        hit = next((name for name in names if name in captions), None)
        used.add(hit)
        found.append(video if hit is None else replace(video, caption=captions[hit]))
    unused = [name for name in captions if name not in used]
    if videos and len(unused) == len(captions):
        raise UserError(f"{table} has no caption of a video in {root}: it should name them like {videos[0].name}")
    if unused or None in used:
        without = sum(not video.caption for video in found)
        _log.warning("%s: %d captions of videos that are not there, %d videos without a caption", table, len(unused), without)
    return found


def _entries(table: Path) -> Iterator[tuple[str, str, str]]:
    """(where, name, caption) of each line of a captions file."""
    suffix = table.suffix.lower()
    rows = _text_rows(table) if suffix == ".txt" else _object_rows(table) if suffix == ".json" else read_table(table)
    if suffix not in (".txt", ".json", *TABLES):
        raise UserError(f"--captions {table}: it should end in .txt .json {' '.join(TABLES)}")
    for where, row in rows:
        name = next((row[column] for column in NAME_COLUMNS if row.get(column)), None)
        caption = next((row[column] for column in TEXT_COLUMNS if row.get(column) is not None), None)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UserError(f"{table} {where}: it needs a name (column path, name, file or video) and a text (caption or text)")
        try:
            yield where, name.strip().removeprefix("./"), check_caption(caption)
        except ValueError as error:
            raise UserError(f"{table} {where}: {error}") from None


def _text_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines `NAME CAPTION`, with a tab or, where there is none, a blank between."""
    for number, line in enumerate(_read(table).splitlines(), 1):
        name, _, caption = line.partition("\t") if "\t" in line else line.strip().partition(" ")
        if line.strip():
            yield f"line {number}", {"name": name, "caption": caption}


def _object_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """{name: caption}, or a list of objects."""
    try:
        values = json.loads(_read(table))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table} is not JSON: {error}") from None
    if isinstance(values, dict):
        values = [{"name": name, "caption": caption} for name, caption in values.items()]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f'{table}: captions in JSON are {{"name": "caption", ...}} or [{{"path": ..., "caption": ...}}, ...]')
    for number, value in enumerate(values, 1):
        yield f"entry {number}", value


def _read(table: Path) -> str:
    try:
        if table.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{table} is larger than {MAX_JSON_BYTES >> 20} MiB: save it as JSONL, CSV or Parquet")
        return table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8: save it as UTF-8") from None
