"""A training script in this process or in the ranks of `tests.distributed.run`, which may die at a moment that is named."""

import contextlib
import importlib
import os
import signal
import sys
from typing import Any

import pytest

from launch.env import Env
from tests.distributed import run


def commands(env: Env, script: str, lines: list[list[str]], dies: list[str] | None = None) -> None:
    """What the script does with each of the command lines, one after the other, all of it but the start of its processes.

    `dies`: the name of a function and a text; a rank is killed when it calls the function with the text in an argument.
    """
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "distributed", lambda timeout: contextlib.nullcontext(env))
        if dies:
            _die(patch, *dies)
        for line in lines:
            patch.setattr(sys, "argv", [script, *line])
            module.main()


def kill(script: str, line: list[str], *dies: str) -> None:
    """Run a command on two ranks and see it killed (see `commands`)."""
    with pytest.raises(AssertionError, match=f"exit statuses .*-{int(signal.SIGKILL)}"):
        run(commands, script=script, lines=[line], dies=dies)


def _die(patch: pytest.MonkeyPatch, function: str, text: str) -> None:
    module, _, name = function.rpartition(".")
    original = getattr(importlib.import_module(module), name)

    def deadly(*arguments: Any, **named: Any) -> Any:
        if any(text in str(argument) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    patch.setattr(function, deadly)
