"""One command at a time works on a run folder: a lock that the kernel frees when its holder ends, however that ends."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from utils.errors import UserError

LOCK = "lock"
"""File of a run folder that is locked; it says who did that last. A file without a holder locks nothing.

The process that holds the lock must not open this file again: the lock goes with the first descriptor of it that is closed.
"""

PATIENCE = 60.0
"""Seconds to wait for a holder that may just be ending: a killed process frees its lock only when its memory has been given back, and
that of page-locked hundreds of GB takes long."""

_QUIET = 3.0
"""Seconds of waiting before anything is said of it."""

_log = logging.getLogger(__name__)


class RunLock:
    """The lock of one run folder, held by one process, or by nobody.

    It is a record lock: workers that the holder forks do not keep it alive, and servers of network file systems know it.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path, patience: float | None = None) -> None:
        """Hold the lock of `folder`. Raises UserError naming the holder when it is not free within `patience` seconds."""
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        began = time.monotonic()
        patience = PATIENCE if patience is None else patience
        said = False
        while not _try(descriptor, folder):
            waited = time.monotonic() - began
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
            if waited > _QUIET and not said:
                said = True
                _log.warning("%s is in use by %s: waiting for it, %.0f s at most", folder, holder, patience - waited)
            if waited >= patience:
                os.close(descriptor)
                cure = f"stop it, or begin another run with --resume none; where that host is gone for good, delete {folder / LOCK}"
                raise UserError(f"{folder} is in use by {holder}: {cure}")
            time.sleep(0.1)
        self._descriptor = descriptor
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n".encode(), 0)
        except OSError:  # a full disk: the lock holds without the note too
            return

    def close(self) -> None:
        """Give the lock back. Nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _try(descriptor: int, folder: Path) -> bool:
    """Take the lock if it is free. Where the file system has no locks there is nothing to wait for."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        _log.warning("the file system of %s cannot lock (%s): see to it that no second command works on this run", folder, error.strerror)
    return True
