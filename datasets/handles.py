"""The open shards of a process."""

import os
import threading

from datasets.mixture import Collection
from utils.errors import ConfigError, UserError

MAX_FILES = 256
"""Shards that a process holds open; the one opened first goes first."""


class Handle:
    """An open file that closes when nobody holds it: a thread may still read what another has let go."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Handles:
    """Opens shards when first read, so that it survives fork and pickling."""

    def __init__(self, shards: Collection) -> None:
        self._shards = shards
        self.bad = dict(shards.bad)
        """Shards that cannot be opened, with the line that says why: each is tried once."""
        self._open: dict[int, Handle] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_open": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def get(self, shard: int) -> Handle:
        """The tar of a shard, fetched before if the set is remote. UserError when that cannot be."""
        found = self._open.get(shard)
        if found is not None:
            return found
        if shard in self.bad:
            raise UserError(self.bad[shard])
        try:
            handle = Handle(self._shards.open_shard(shard))
        except ConfigError:
            raise
        except UserError as error:
            self.bad[shard] = str(error)
            raise
        with self._lock:
            while len(self._open) >= MAX_FILES:
                del self._open[next(iter(self._open))]
            # Two threads may both come here: the file of the one that is late closes itself.
            return self._open.setdefault(shard, handle)
