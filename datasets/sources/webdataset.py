"""Tars of video files with texts beside them, as video2dataset and others write them. Nothing is unpacked: videos are listed by offset.

The tars are not trusted: only headers and small texts are read, all sizes are bounded, links and devices are passed over, and a
member's name is never a path.
"""

import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from datasets.shards import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from datasets.sources.base import Listing, SourceOptions, Video, class_names, peek, printable, relative, walk
from datasets.sources.captions import MAX_CAPTION_BYTES, check_caption, decode_caption
from datasets.sources.splits import split_off
from utils.errors import UserError

TAR = frozenset({".tar"})
MAX_VIDEO_BYTES = 4 << 30
MAX_CARD_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_CLASS_BYTES = 256
MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)
GROUP_FIELDS = ("group", "source", "url")
"""Fields of a sample's json that say which recording it was cut from."""


class WebDatasetSource:
    """Samples <key>.<video ending> with <key>.txt (caption), <key>.json (caption, and url, source or group) and <key>.cls (class)."""

    name = "webdataset"
    summary = "tars of <key>.mp4 with <key>.txt or .json (caption) and .cls (class), as video2dataset writes them"
    kind: Literal["videos", "frames"] = "videos"
    honours: frozenset[str] = frozenset()

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """A tar, or a folder with tars and no videos or pictures beside them."""
        if root.is_file():
            return root.suffix.lower() in TAR
        return bool(peek(root, TAR, options.exclude)) and not peek(root, VIDEO_SUFFIXES | IMAGE_SUFFIXES, options.exclude)

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All video members in the order of the tars. Damaged tars give what comes before the damage, and are rejected by name."""
        tars = [root] if root.is_file() else walk(root, TAR, options.exclude)
        if not tars:
            raise UserError(f"{root} holds no .tar files; compressed ones have to be unpacked to .tar first")
        names = [path.name if path == root else relative(path, root) for path in tars]
        found: list[tuple[Video, str]] = []
        rejected: list[tuple[str, str, str]] = []
        for path, name, (split, _) in zip(tars, names, split_off(names), strict=True):
            for video, label in _read_tar(path, name, rejected):
                found.append((replace(video, split=split), label))
        if any(label for _, label in found):
            rejected += [(video.name, "no class", "other samples have a .cls, this one has none") for video, label in found if not label]
            found = [(video, label) for video, label in found if label]
        classes = class_names(label for _, label in found if label)
        index = {name: number for number, name in enumerate(classes)}
        return Listing([replace(video, label=index.get(label, 0)) for video, label in found], classes, rejected=rejected)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


class _BadSample(Exception):
    """(reason, detail) of a sample that cannot be used."""


class _BoundedFile(FileIO):
    """A file that refuses large reads: the headers of an archive announce the length of their texts, and may lie."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def _read_tar(path: Path, name: str, rejected: list[tuple[str, str, str]]) -> Iterator[tuple[Video, str]]:
    """(video, its class or empty) of each sample of a tar; what cannot be used is added to `rejected`."""
    samples: dict[str, dict[str, _Member]] = defaultdict(dict)
    try:
        with _BoundedFile(path) as file:
            for member in _members(file, name, rejected):
                found = MEMBER.fullmatch(member.name)
                if not found:
                    continue
                extension = found["extension"].lower()
                if extension in samples[found["key"]]:
                    rejected.append((f"{name}/{printable(member.name)}", "duplicate key", "the tar has the name twice; the first counts"))
                else:
                    samples[found["key"]][extension] = member
            for key, members in samples.items():
                try:
                    yield from _sample(path, name, members, file.fileno())
                except _BadSample as error:
                    rejected.append((f"{name}/{printable(key)}", *error.args))
    except OSError as error:
        rejected.append((name, "damaged tar", f"cannot be read: {error.strerror}"))


def _members(file: FileIO, name: str, rejected: list[tuple[str, str, str]]) -> Iterator[_Member]:
    """The regular files of a tar. Damage ends it and is added to `rejected` with its offset."""
    size, position = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.size < 0 or tar.offset <= position:
                    raise tarfile.ReadError("a member of negative size")
                if info.isreg() and not info.issparse():
                    if info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"cut off inside {printable(info.name)}")
                    yield _Member(info.name, info.offset_data, info.size)
                position = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # it would keep all headers of a large tar
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
        if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("cut off" if len(end) < tarfile.BLOCKSIZE else "no header where one should be")
    except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
        rejected.append((name, "damaged tar", f"after byte {position}: {printable(str(error))[:200]}; what comes before is used"))


def _sample(path: Path, tar_name: str, members: dict[str, _Member], fd: int) -> Iterator[tuple[Video, str]]:
    videos = [member for extension, member in members.items() if f".{extension.rpartition('.')[2]}" in VIDEO_SUFFIXES]
    if not videos:
        raise _BadSample("no video in the sample", f"only {printable(' '.join(members))[:200]}")
    card = _card(members, fd)
    caption = _caption(members, card, fd)
    label = _class(members, fd)
    group = next((card[field] for field in GROUP_FIELDS if isinstance(card.get(field), str) and card[field]), "")
    for member in videos:
        if not 0 < member.size <= MAX_VIDEO_BYTES:
            raise _BadSample("empty video" if not member.size else "video too large", f"{member.size} bytes")
        name = f"{tar_name}/{printable(member.name)}"
        yield Video(path, name, caption=caption, group=printable(group), member=(member.offset, member.size)), label


def _read(member: _Member | None, limit: int, fd: int) -> bytes:
    if member is None:
        return b""
    if member.size > limit:
        raise _BadSample("text too large", f"{printable(member.name)[:200]} has {member.size} bytes, more than {limit}")
    return os.pread(fd, member.size, member.offset)


def _card(members: dict[str, _Member], fd: int) -> dict[str, Any]:
    text = _read(members.get("json"), MAX_CARD_BYTES, fd)
    try:
        card = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        raise _BadSample("damaged json", "not JSON") from None
    return card if isinstance(card, dict) else {}


def _caption(members: dict[str, _Member], card: dict[str, Any], fd: int) -> str:
    try:
        if "txt" in members:
            return decode_caption(_read(members["txt"], MAX_CAPTION_BYTES, fd))
        return next((check_caption(card[field]) for field in ("caption", "text") if isinstance(card.get(field), str)), "")
    except ValueError as error:
        raise _BadSample("damaged caption", str(error)) from None


def _class(members: dict[str, _Member], fd: int) -> str:
    label = _read(members.get("cls"), MAX_CLASS_BYTES, fd).decode(errors="replace").strip()
    return (label.lstrip("0") or "0") if re.fullmatch("[0-9]+", label) else printable(label)
