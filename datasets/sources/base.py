"""What a source of videos is, what it lists, and what layouts share: walking folders, natural order, class numbers."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

from datasets.conditions import CondFormat
from datasets.shards import IMAGE_SUFFIXES, INDEX, VIDEO_SUFFIXES
from datasets.sources.embeddings import Embedding, beside, open_all
from utils.errors import UserError

MAX_LABEL = 65535
PEEK = 2000
LOOK = 100_000
"""To find out what a folder is, at most PEEK files of a kind are taken, among the first LOOK of any kind."""


@dataclass(frozen=True, slots=True)
class Video:
    """One source video: a file, a part of a file, a folder of pictures, or a member of a tar."""

    path: Path
    """The file, the folder of pictures, or the tar that holds `member`."""
    name: str
    """Path relative to the source root, with slashes, and `@<start>-<end>` for a span: names the video for good."""
    label: int = 0
    caption: str = ""
    is_frames: bool = False
    span: tuple[float, float] | None = None
    """Seconds [start, end) of the file that are wanted; the end may be infinite."""
    group: str = ""
    """Videos of one group never go to different splits; empty: the name without its span."""
    member: tuple[int, int] | None = None
    """(offset, size) in bytes of the video inside the tar `path`."""
    split: str = ""
    """train, val or test where the data set says so."""
    frames: tuple[str, ...] = ()
    """File names of the pictures in order; empty: all pictures of the folder."""
    fps: float = 0.0
    """Frame rate of the pictures where the data set says it, else 0."""
    vector: Path | None = None
    """File of the condition vector, where the data set names one; `list_videos` looks beside the video for others."""
    embedding: Embedding | None = None
    """The condition vector, once all are known to be alike."""

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the name's hash: the video's part of a sample key."""
        return hash16(self.name)

    @property
    def split_group(self) -> str:
        """What the split by share hashes: the group, or the name without its span."""
        return self.group or (self.name.rpartition("@")[0] if self.span else self.name)

    def frame_paths(self) -> list[Path]:
        """The pictures of a frame video, in order."""
        if self.frames:
            return [self.path / name for name in self.frames]
        pictures = (path for path in self.path.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
        return sorted(pictures, key=lambda path: natural_key(path.name))

    def content_id(self) -> list[int]:
        """What tells cheaply that the source changed: its bytes, offset and bytes inside its tar, or its number of pictures if many.

        Nothing for one that is gone or closed: the report names it, as any other that cannot be read.
        """
        try:
            if self.member:
                return list(self.member)
            if len(self.frames) == 1:
                return [(self.path / self.frames[0]).stat().st_size]
            return [len(self.frames) or len(self.frame_paths())] if self.is_frames else [self.path.stat().st_size]
        except OSError:
            return []


@dataclass(frozen=True)
class Listing:
    """What a layout found."""

    videos: list[Video]
    classes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names that a list of the data set mentions and the folder lacks."""
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, reason, detail) of what is there and cannot be used: a damaged tar, a sample without its class."""

    @property
    def cond(self) -> CondFormat | None:
        """What the condition vectors are; None where there are none."""
        embedding = self.videos[0].embedding if self.videos else None
        return embedding.form if embedding else None


@dataclass(frozen=True)
class SourceOptions:
    """Which part of a data set is wanted, and where its lists are."""

    split: str = "all"
    """all, train, val or test."""
    fold: int = 1
    split_lists: Path | None = None
    val_fraction: float = 0.0
    exclude: Path | None = None
    """A folder that is not looked into: where the shards go."""
    captions: Path | None = None
    """A table or text file of captions by video name."""
    filter: Path | None = None
    """A text file of patterns: only videos that one of them matches are taken."""


class Source(Protocol):
    """A layout of videos on disk."""

    name: str
    summary: str
    """One line for the help text: what the folder looks like."""
    kind: Literal["videos", "frames"]
    honours: frozenset[str]
    """Those of the options fold, split_lists and captions that mean something here; others are refused."""

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """Whether the folder or file is surely of this layout; takes a look at some files, see `peek`."""

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos, each with the split that the data set gives it; UserError, one line, where the layout is another."""


def with_embeddings(videos: list[Video], where: Path) -> list[Video]:
    """The videos with the condition vectors that the data set names, or else those beside them. UserError, see `open_all`."""
    found = [video.vector for video in videos]
    if not any(found) and not any(video.member for video in videos):
        # Of pictures that lie together with others, the folder is not the video.
        named = [(video.path / Path(video.name).name, False) if video.frames else (video.path, video.is_frames) for video in videos]
        found = list(beside(named))
    opened = open_all([(video.name, path) for video, path in zip(videos, found, strict=True)], where)
    return videos if opened is None else [replace(video, embedding=one) for video, one in zip(videos, opened, strict=True)]


def hash16(text: str) -> str:
    """16 hexadecimal digits of the sha256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def printable(text: str) -> str:
    """A text from an archive or the name of a file, safe to show and to keep: what is not printable is written as an escape."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that counts: a before a2 before a10."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part), "") if number % 2 else (1, 0, part.lower()) for number, part in enumerate(parts)] + [(-1, 0, text)]


def _files(root: Path, exclude: Path | None) -> Iterator[Path]:
    """Files below `root`; hidden names and shard sets are passed over, links followed, a folder that was seen is not entered again."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    seen = {os.path.realpath(exclude)} if exclude is not None else set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        # A set that was made before, of another split perhaps, has pictures and tars too.
        is_shard_set = Path(folder) != root and INDEX in names and any(name.startswith("shard-") for name in names)
        if real in seen or is_shard_set:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def walk(root: Path, suffixes: frozenset[str], exclude: Path | None = None) -> list[Path]:
    """All files below `root` with one of the suffixes, in natural order of their path. UserError for a folder that cannot be read."""
    found = (path for path in _files(root, exclude) if path.suffix.lower() in suffixes)
    return sorted(found, key=lambda path: natural_key(relative(path, root)))


def peek(root: Path, suffixes: frozenset[str], exclude: Path | None = None) -> list[Path]:
    """Some files below `root` with one of the suffixes; none where `root` is no folder."""
    looked = islice(_files(root, exclude), LOOK) if root.is_dir() else ()
    return list(islice((path for path in looked if path.suffix.lower() in suffixes), PEEK))


def peek_frames(root: Path, exclude: Path | None = None) -> list[Path]:
    """Some pictures below `root`; none where there are videos too."""
    return [] if peek(root, VIDEO_SUFFIXES, exclude) else peek(root, IMAGE_SUFFIXES, exclude)


def relative(path: Path, root: Path) -> str:
    """Path below the root, with slashes."""
    return path.relative_to(root).as_posix()


def class_names(labels: Iterable[str]) -> list[str]:
    """Classes of the labels of a data set. Where all are numbers, label 7 is class 7: 0, 1, ... up to the largest; else natural order.

    UserError for a number above MAX_LABEL.
    """
    names = set(labels)
    if not names or not all(re.fullmatch("[0-9]+", name) for name in names):
        return sorted(names, key=natural_key)
    top = max(int(name) for name in names)
    if top > MAX_LABEL:
        raise UserError(f"class number {top} is above {MAX_LABEL}: give the classes as text")
    return [str(number) for number in range(top + 1)]
