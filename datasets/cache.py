"""A folder of files named by their sha256, bounded in size, that all processes of a machine share.

    <folder>/lock              held (flock) while room is made: what is there is counted and the least recently used goes
    <folder>/<name>            a whole file; its time stamp is when it was last asked for
    <folder>/<name>.part       being written by the process that holds its flock, at its full size from the start

A killed process leaves at most a `.part` that nobody holds: the next who makes room removes it. Files are given out open, so that one
which goes in the meantime does no harm.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import ConfigError, UserError

PART = ".part"
LOCK = "lock"
FAILED = b"kinoform: not fetched: "
MAX_WORD = 2000
WAIT = 0.1
"""Seconds between two looks for room that other downloads hold."""


class Cache:
    """The cache in `folder`, of `capacity` bytes at most. May be pickled; any number of threads and processes may use it."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity

    def lookup(self, name: str, nbytes: int | None = None) -> int | None:
        """An open descriptor of the file `name`, which counts as used now; None when it is not there (or not `nbytes` large)."""
        try:
            file = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._trouble(error) from None
        if nbytes is not None and os.fstat(file).st_size != nbytes:
            os.close(file)
            return None
        with suppress(OSError):  # it went, or is another user's: it can be read all the same
            _touch(self.folder / name)
        return file

    def open(self, name: str, nbytes: int, write: Callable[[int], None], stopped: Callable[[], bool] = lambda: False) -> int:
        """An open descriptor of the file `name` of `nbytes` bytes, which `write` fills first when it is not there.

        Of several who ask at once one writes and the others wait. What `write` raises is passed on and nothing is kept; a UserError
        is also what the others get. Raises ConfigError for a file larger than the cache, UserError when the folder cannot be written.
        """
        if (found := self.lookup(name, nbytes)) is not None:
            return found
        self.check_room(nbytes, name)
        part = self.folder / (name + PART)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._held(part) as file:
                if (found := self.lookup(name, nbytes)) is not None:
                    part.unlink()
                    return found
                self._reserve(file, nbytes, stopped)
                try:
                    write(file)
                except UserError as error:
                    if not stopped():
                        _leave_word(file, str(error))
                    raise
                _touch(file)
                os.fsync(file)
                os.replace(part, self.folder / name)
                return os.open(f"/dev/fd/{file}", os.O_RDONLY)
        except OSError as error:
            raise self._trouble(error) from None

    def check_room(self, nbytes: int, what: str) -> None:
        """ConfigError when `nbytes` at once are more than the cache may hold."""
        if nbytes > self.capacity:
            raise ConfigError(
                f"the cache {self.folder} may hold {self.capacity / 2**30:.3g} GiB, {what} needs {nbytes / 2**30:.3g} GiB: "
                f"use --cache-gib {-(-nbytes * 11 // (10 * 2**30))} or more"
            )

    @contextmanager
    def _held(self, part: Path) -> Iterator[int]:
        """The `.part` file, created and locked; removed at the end unless it was renamed."""
        while True:
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _same(file, part):
                    break
                if word := _word(file):
                    raise UserError(word)
            except BaseException:
                _release(file)
                raise
            _release(file)  # whoever held it has renamed or removed it meanwhile
        try:
            yield file
        finally:
            if _same(file, part):
                part.unlink(missing_ok=True)
            _release(file)

    def _reserve(self, file: int, nbytes: int, stopped: Callable[[], bool]) -> None:
        """Gives the part its full size, once the rest leaves room for it."""
        while True:
            with (self.folder / LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    os.ftruncate(file, 0)
                    if self._make_room(nbytes):
                        os.ftruncate(file, nbytes)
                        return
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)
            # The rest is being written by others, and can go when it is done.
            if stopped():
                raise UserError("stopped while waiting for room in the cache")
            time.sleep(WAIT)

    def _make_room(self, nbytes: int) -> bool:
        """Removes the least recently used files until `nbytes` more fit. False when files that are being written stand in the way."""
        found, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == LOCK or not entry.is_file(follow_symlinks=False):
                    continue
                if entry.name.endswith(PART) and _abandoned(entry.path):
                    continue
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                total += stat.st_size
                if not entry.name.endswith(PART):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        for _, size, path in sorted(found):
            if total + nbytes <= self.capacity:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total + nbytes <= self.capacity

    def _trouble(self, error: OSError) -> UserError:
        return UserError(f"cannot use the cache {self.folder}: {error.strerror or error}; free space there or name another --cache-dir")


def _touch(file: int | Path) -> None:
    """Marks a file as used now; to the nanosecond, for the clock that the kernel itself would use stands still for milliseconds."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _release(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing does not free it where a process forked meanwhile
    os.close(file)


def _leave_word(file: int, text: str) -> None:
    """Why a `.part` was given up, for those who wait for its lock: each would else try as long as this process did."""
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, FAILED + text.encode()[:MAX_WORD], 0)


def _word(file: int) -> str:
    """What `_leave_word` left in a file; empty when it holds anything else."""
    data = os.pread(file, len(FAILED) + MAX_WORD, 0)
    return data.removeprefix(FAILED).decode(errors="replace") if data.startswith(FAILED) else ""


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _abandoned(path: str) -> bool:
    """Whether nobody holds a `.part` file; then it is removed."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same(file, Path(path)):
            Path(path).unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
