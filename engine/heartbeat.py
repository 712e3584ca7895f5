"""A file that tells from outside how far a run is and whether it lives: `heartbeat.json` in the run folder.

    python -m engine.heartbeat RUN --max-age 900

says what it tells. Exit status: 0 the run starts, its steps end, or it has ended well; 1 it hangs, is gone or has failed; 2 no such file.
Give a `--max-age` above what the longest step, evaluation or checkpoint takes, and a `--max-start` above what it takes to check and
load a checkpoint. A run that has failed has that time to start again, as the launch scripts have it do. Nothing heavy is imported: a
probe may call it often.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FILE = "heartbeat.json"
EVERY = 5.0
"""Seconds between two writes."""
MAX_AGE, MAX_START = 900.0, 3600.0
"""Seconds without a step after which a run hangs, and that its start may take before the first, also after a failure."""

State = Literal["starting", "running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Beat:
    """What the file says; times are those of the writer's clock, in seconds since 1970."""

    step: int
    total: int
    stepped: float
    """When the last step ended, or the run began."""
    time: float
    """When this was written."""
    pid: int
    host: str
    state: State


class Heartbeat:
    """A thread that writes the file while the process lives, and a line where nothing else has been said for a while."""

    def __init__(self, folder: Path, step: int, total: int, every: float = EVERY) -> None:
        self._file = folder / FILE
        self._total = total
        self._every = every
        self._last = step, time.time()
        self._quiet = 0.0
        self._say: Callable[[str], None] | None = None
        self._marked = time.monotonic(), step
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self, quiet: float = 0.0, say: Callable[[str], None] | None = None) -> None:
        """Begin; `say` gets a line on the run when `mark` was not called for `quiet` seconds (0: never)."""
        self._quiet, self._say = quiet, say
        self._marked = time.monotonic(), self._last[0]
        self._thread.start()

    def beat(self, step: int) -> None:
        """`step` has ended."""
        self._last = step, time.time()

    def mark(self) -> None:
        """Something has been said of the run."""
        self._marked = time.monotonic(), self._last[0]

    def stop(self, state: State) -> None:
        """End the thread; the file says how the run ended."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write(state)

    def _run(self) -> None:
        self._write("running")
        written = time.monotonic()
        pause = min(self._every, self._quiet) if self._quiet > 0 and self._say else self._every
        while not self._end.wait(pause):
            if time.monotonic() - written >= self._every:
                self._write("running")
                written = time.monotonic()
            self._speak()

    def _speak(self) -> None:
        marked, before = self._marked
        silent = time.monotonic() - marked
        if self._say is None or not 0 < self._quiet <= silent:
            return
        step, ended = self._last
        pace = f"{silent / (step - before):.3f} s/step, the last ended" if step > before else "the last step ended"
        self._say(f"step {step}/{self._total} | {pace} {time.time() - ended:.0f} s ago")
        self.mark()

    def _write(self, state: State) -> None:
        step, stepped = self._last
        _write(self._file, step, self._total, stepped, state)


def announce(folder: Path) -> None:
    """Say that a run starts: what the file said of an attempt before this one no longer holds."""
    _write(folder / FILE, 0, 0, time.time(), "starting")


def _write(file: Path, step: int, total: int, stepped: float, state: State) -> None:
    """Replace the file. Its temporary neighbour has one name, so that a process killed meanwhile leaves one file at most."""
    beat = Beat(step, total, round(stepped, 3), round(time.time(), 3), os.getpid(), socket.gethostname(), state)
    temporary = file.with_name(f".{FILE}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        return  # a full disk: the file grows old, which is what a reader must know


def read(folder: Path) -> Beat:
    """The heartbeat of a run folder. Raises OSError where there is none and ValueError for another file."""
    values = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    try:
        return Beat(**values)
    except TypeError:
        raise ValueError(f"{Path(folder) / FILE} is not a heartbeat") from None


def judge(beat: Beat, now: float, max_age: float, max_start: float = MAX_START) -> tuple[bool, str]:
    """Whether all is well, and that in words."""
    if beat.state == "starting":
        return now - beat.time <= max_start, f"starting: process {beat.pid} on {beat.host}, for {max(now - beat.time, 0):.0f} s"
    where = f"step {beat.step}/{beat.total} on {beat.host}, process {beat.pid}"
    if beat.state == "failed":
        return now - beat.time <= max_start, f"failed at {where}, {max(now - beat.time, 0):.0f} s ago, and has not started again"
    if beat.state != "running":
        return True, f"{beat.state} at {where}"
    if now - beat.time > max_age:
        return False, f"gone: {where} wrote nothing for {now - beat.time:.0f} s"
    if beat.time - beat.stepped > max_age:
        return False, f"hangs: {where} lives, but no step ended for {beat.time - beat.stepped:.0f} s"
    return True, f"running: {where}, the last step ended {max(now - beat.stepped, 0):.0f} s ago"


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.heartbeat", description="Says whether a run lives, from its heartbeat.json.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--max-age", type=float, default=MAX_AGE, help=f"seconds without a step that are a hang (default {MAX_AGE:g})")
    parser.add_argument(
        "--max-start", type=float, default=MAX_START, help=f"seconds that a start may take, also a new one (default {MAX_START:g})"
    )
    args = parser.parse_args()
    try:
        well, words = judge(read(args.run), time.time(), args.max_age, args.max_start)
    except (OSError, ValueError) as error:
        print(f"error: no heartbeat to read: {error}", file=sys.stderr)
        return 2
    print(words)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
