"""Files that are either whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def _beside(path: Path) -> Path:
    """A temporary name beside `path`, whose folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there replaces `path` in one rename, or nothing does.

    Makes the parent folder. The temporary name ends in `.tmp` and is removed when the block raises.
    """
    temporary = _beside(path)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; its files replace the folder `path` when the block ends, or nothing does.

    A folder that is there already is deleted just before, so a kill between the two leaves none.
    """
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for place in (*temporary.iterdir(), temporary):
            fsync_path(place)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_path(Path(path).parent)


@contextmanager
def writing_alone(folder: Path) -> Iterator[bool]:
    """Whether no other process is in such a block of this folder, as far as its file system can tell (False where it cannot)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


@contextmanager
def waiting_turn(path: Path) -> Iterator[None]:
    """Enters the block once no other process is in one of this file, which is made where it is not there and may be replaced in the block.

    At once where its file system knows no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):  # else it was replaced while this one waited
                yield
                return
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> int:
    """Delete what `atomic_path` and `atomic_folder` left in a folder when they were killed; how many that were. Nobody may be writing."""
    left = [place for place in folder.iterdir() if _TEMPORARY.fullmatch(place.name)] if folder.is_dir() else []
    for place in left:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
    return len(left)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by a file of these bytes."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by a file of this text, UTF-8."""
    atomic_write_bytes(path, text.encode())


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
