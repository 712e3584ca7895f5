"""Condition vectors of source videos: `<name>.emb.npy` beside a video, or what a manifest names."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets.conditions import MAX_VECTOR_BYTES, MEMBER, CondFormat, look
from utils.errors import UserError

HEAD_BYTES = 1 << 12


@dataclass(frozen=True)
class Embedding:
    """A npy file that was looked at, and what every file of its set holds."""

    path: Path
    form: CondFormat

    def read(self) -> bytes:
        """The member that is stored of it. ValueError when it is not what it was, OSError when it cannot be read."""
        with self.path.open("rb") as file:
            return self.form.member(file.read(2 * MAX_VECTOR_BYTES))

    def content_id(self) -> int:
        """What tells cheaply that the numbers changed: a sum of the file's first bytes. Nothing (-1) for one that is gone."""
        try:
            with self.path.open("rb") as file:
                return zlib.crc32(file.read(HEAD_BYTES))
        except OSError:
            return -1


def beside(paths: list[tuple[Path, bool]]) -> Iterator[Path | None]:
    """For each video (its file, or its folder of frames: True) the vector that lies beside it; each folder is read once."""
    folders: dict[Path, set[str]] = {}
    for path, is_folder in paths:
        parent = path.parent
        if parent not in folders:
            folders[parent] = {entry.name for entry in parent.iterdir() if entry.name.endswith(f".{MEMBER}")}
        name = f"{path.name if is_folder else path.stem}.{MEMBER}"
        yield parent / name if name in folders[parent] else None


def open_all(found: list[tuple[str, Path | None]], where: Path) -> list[Embedding] | None:
    """The vectors of (video, file), by their headers; None when no video has one. UserError unless all have, of one shape and type."""
    if not any(path for _, path in found):
        return None
    first: tuple[str, CondFormat] | None = None
    opened = []
    for video, path in found:
        if path is None:
            without = sum(other is None for _, other in found)
            raise UserError(f"{where}: {without} of {len(found)} videos have no {MEMBER}, {video} is one: give each of them one, or none")
        try:
            form = look(path)
        except ValueError as error:
            raise UserError(f"{path} is no condition vector: {str(error).splitlines()[0][:200]}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        first = first or (str(path), form)
        if form != first[1]:
            raise UserError(f"{path} is {form}, {first[0]} is {first[1]}: all condition vectors of a set have one shape and type")
        opened.append(Embedding(path, first[1]))
    return opened
