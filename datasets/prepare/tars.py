"""Reading the members of a shard's tar one after the other, as bytes: nothing is unpacked, and nothing it says is believed unchecked."""

import os
import tarfile
from dataclasses import dataclass
from typing import BinaryIO

from datasets.tables import MAX_MEMBER_BYTES, MAX_SHARD_BYTES

BLOCK = tarfile.BLOCKSIZE
MAX_END = 2 * tarfile.RECORDSIZE
"""Zeros that may stand behind the last member."""


class BadTar(Exception):
    """What is wrong with a tar, where."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: the part of its name after the sample's key and a dot, where its bytes begin, and the bytes."""

    extension: str
    offset: int
    payload: bytes


def _header(file: BinaryIO, place: int) -> tarfile.TarInfo | None:
    """The header at byte `place`; None at the zeros that end a tar."""
    file.seek(place)
    block = file.read(BLOCK)
    if len(block) == BLOCK and not block.strip(b"\0"):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise BadTar(f"the tar header at byte {place} is damaged ({error})") from None
    if not info.isreg():
        raise BadTar(f"the member at byte {place} is no plain file")
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise BadTar(f"the member at byte {place} says it has {info.size} bytes")
    return info


def read_members(file: BinaryIO, place: int, key: str, stop: int = MAX_SHARD_BYTES) -> tuple[list[Member], int]:
    """The members of sample `key`, whose first header is at byte `place`, and where they end; at `stop` the next sample begins.

    BadTar when there is no such sample, or a member is damaged or cut off.
    """
    found: list[Member] = []
    while place < stop and (info := _header(file, place)) is not None:
        name, _, extension = info.name.partition(".")
        if name != key:
            break
        if place + BLOCK + info.size > os.fstat(file.fileno()).st_size:
            raise BadTar(f"the tar ends inside its .{extension}")
        found.append(Member(extension, place + BLOCK, file.read(info.size)))
        place += BLOCK + -(-info.size // BLOCK) * BLOCK
    if not found:
        raise BadTar(f"is not at byte {place} of the tar")
    return found, place


def read_end(file: BinaryIO, place: int) -> None:
    """BadTar when something other than zeros stands behind the last member."""
    if _header(file, place) is not None:
        raise BadTar(f"a member at byte {place} is not in the offset index")
    file.seek(place)
    if file.read(MAX_END + 1).strip(b"\0") or os.fstat(file.fileno()).st_size > place + MAX_END:
        raise BadTar(f"there is something behind the end of the tar at byte {place}")
