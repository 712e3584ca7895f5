"""preprocess.py as a user runs it, in this process, for tests of the data path."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import preprocess
from utils.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: object) -> list[str]:
    """The command line of `preprocess.py shards`."""
    return [sys.executable, str(ROOT / "preprocess.py"), "shards", *map(str, arguments)]


def call(*arguments: object, code: int = 0) -> str:
    """Runs preprocess.py in this process. Returns what it printed; the last line is the error, where one is expected."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", ["preprocess.py", *map(str, arguments)])
        try:
            preprocess.main()
            found = 0
        except UserError as error:
            found = 2 if isinstance(error, ConfigError) else 1
            print(error)
        except SystemExit as end:
            found = int(end.code or 0)
    assert found == code, output.getvalue()
    return output.getvalue()


def run(*arguments: object, code: int = 0) -> str:
    """`preprocess.py shards` with one worker."""
    return call("shards", "--workers", 1, *arguments, code=code)


def report(out: Path) -> dict[str, object]:
    """report.json of a set."""
    return dict(json.loads((out / "report.json").read_text()))
