"""The processes of a launch under test, how far its run is, and waiting for either."""

import os
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MARK = "KINOFORM_TEST_MARK"
"""Variable with the mark by which `Processes` finds its own."""


class Processes:
    """The processes of a launch, found by a mark in their environment, which children inherit."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def all(self) -> dict[int, str]:
        """Number -> command line."""
        found = {}
        for place in Path("/proc").iterdir():
            if not place.name.isdecimal() or int(place.name) == os.getpid():
                continue
            try:
                if f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes() and _state(int(place.name)) != "Z":
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL for all of them, as when their machine loses its power."""
        while there := self.all():
            for number in there:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)

    def of_kind(self, kind: str) -> list[int]:
        """Numbers of the agents, the ranks, or the loaders' processes that are there."""
        lines = self.all()
        agents = [number for number, line in lines.items() if "torch.distributed.run" in line]
        ranks = [number for number, line in lines.items() if "chaos_worker" in line and _parent(number) in agents]
        loaders = [number for number, line in lines.items() if "chaos_worker" in line and _parent(number) in ranks]
        return {"agent": agents, "rank": ranks, "loader": loaders}[kind]


def _state(number: int) -> str:
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]


def _parent(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def until(due: Callable[[], object], seconds: float, tick: float = 0.05) -> bool:
    end = time.monotonic() + seconds
    while not due():
        if time.monotonic() > end:
            return False
        time.sleep(tick)
    return True


def saved(results: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(place.name.removeprefix("step_")) for place in results.glob("*/checkpoints/step_*")), default=0)
