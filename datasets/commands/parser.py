"""The command line of preprocess.py: flags with dashes or underscores, a mistake in one line, progress on a terminal or in a log."""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from utils.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, and knows the flags that were meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """One line with the nearest flag."""
        wrong = re.search(r"unrecognized arguments: (\S+)", message)
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(wrong[1].partition("=")[0], known, 1) if wrong else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{message}{hint} (see {self.prog} --help)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse, but an underscore in a flag counts as a dash, and a flag that is unknown is an error of the command itself."""
        given = sys.argv[1:] if args is None else args
        found, rest = super().parse_known_args([self._dashes(argument) for argument in given], namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _dashes(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        dashed = flag.replace("_", "-")
        return dashed + equals + value if flag.startswith("--") and dashed in self._option_string_actions else argument


def whole(low: int) -> Callable[[str], int]:
    """Reads a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def number(low: float = 0.0, high: float = float("inf")) -> Callable[[str], float]:
    """Reads a finite number of [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= min(high, sys.float_info.max):
            bounds = f"of at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")
        return value

    return parse


def share(text: str) -> float:
    """Reads a share in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in [0, 1)")
    return value


def local_folder(text: str) -> Path:
    """Reads the path of a folder; a URL is none."""
    if "://" in text or text.startswith("pipe:"):
        raise argparse.ArgumentTypeError(f"{text} is no folder of this machine: copy the set here first")
    return Path(text)


def cores() -> int:
    """Cores that this process may use; all of them where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.bar = tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())
        self.done, self.last = 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, done: int, note: str = "") -> None:
        """So many are done in all; `note`: what else a line should say."""
        self.bar.update(done - self.done)
        self.done = done
        if self.bar.disable and time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{done} of {self.total} {self.unit}s{note}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line on stdout without tearing the bar apart."""
        self.bar.write(line) if not self.bar.disable else print(line, flush=True)
