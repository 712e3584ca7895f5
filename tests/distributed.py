"""Run a function of a test file in several gloo processes, or a command, with or without torchrun, with a time limit."""

import functools
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore

from launch.env import distributed
from launch.run import run_main

ROOT = Path(__file__).resolve().parent.parent
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["engine.loop", "torch._dynamo", "pytest"])


def environment(**extra: str) -> dict[str, str]:
    """Variables of a child process: our packages first, one thread, no launcher's variables of our own process."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher and not name.startswith("TORCHELASTIC")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def torchrun(arguments: Sequence[str], processes: int = 2, timeout: float = 120, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments under torchrun; kills the whole process group and raises TimeoutExpired after `timeout` seconds."""
    options = ["--standalone", "--max-restarts=0", f"--nproc_per_node={processes}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=timeout)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise
    return subprocess.CompletedProcess(command, child.returncode, output, "")


class Done(subprocess.CompletedProcess[str]):
    """A command that has ended, with what it has written."""

    statuses: list[int | None]
    """The exit status of each rank."""


def command(
    arguments: Sequence[object], processes: int = 1, timeout: float = 120, before: Callable[[], None] | None = None, **extra: str
) -> Done:
    """Run `script ARGUMENT...` or `-m module ARGUMENT...` as `python` does, or as several ranks as torchrun starts them.

    The processes are forked from a process that has imported torch and the engine, which takes most of the time of a command's start;
    for what Python's start or torchrun itself does, start those. `before` (top level of a test file) is called first in each.
    Returns what all of them have written, rank by rank, and the first exit status that is not 0. Once a rank has failed, the others
    are told to end, as by torchrun, and have 20 seconds. Kills all of them and raises TimeoutExpired after `timeout` seconds.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        with _forked(_script, (words, folder, before), processes, extra) as ranks:
            late = _first_failed(ranks, timeout)
            for process in ranks if not late else ():
                process.terminate()
            for process in ranks if not late else ():
                process.join(20)
        places = [[Path(f"{folder}/{rank}.{kind}") for rank in range(processes)] for kind in ("out", "err")]
        out, err = ("".join(place.read_text(errors="replace") for place in kind if place.is_file()) for kind in places)
    if late:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    done = Done(words, next((process.exitcode for process in ranks if process.exitcode), 0), out, err)
    done.statuses = [process.exitcode for process in ranks]
    return done


def interrupt(
    arguments: Sequence[object],
    due: Callable[[], object],
    number: signal.Signals = signal.SIGKILL,
    group: bool = False,
    timeout: float = 120,
) -> int:
    """Start a command as `command` does, send it a signal once `due()` is true, and return its exit status (-9: killed).

    `group`: the signal goes to all its processes. It is sent after `timeout` seconds at the latest, unless the command has ended.
    """
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder, _forked(_script, ([str(word) for word in arguments], folder, None), 1, {}) as (child,):
        assert child.pid is not None
        with suppress(ProcessLookupError):  # it has ended
            while os.getpgid(child.pid) != child.pid or not (due() or child.exitcode is not None or time.monotonic() > end):
                time.sleep(0.002)
            (os.killpg if group else os.kill)(child.pid, number)
        child.join(60)
        assert child.exitcode is not None
        return child.exitcode


def run(function: Callable[..., Any], processes: int = 2, timeout: float = 120, **arguments: Any) -> list[Any]:
    """Call `function(env, **arguments)` (top level of a test file; JSON arguments) on every rank; returns each rank's JSON result.

    The ranks are forked as those of `command` are. Ends all of them when one fails, and raises AssertionError with what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = (function.__code__.co_filename, function.__name__, json.dumps(arguments), folder)
        with _forked(_rank, call, processes, {}, launched=True) as ranks:
            _first_failed(ranks, timeout)
        said = "".join(place.read_text(errors="replace") for place in sorted(Path(folder).glob("*.log")))
        statuses = [process.exitcode for process in ranks]
        assert not any(statuses), f"exit statuses {statuses}\n{said[-6000:]}"
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


@contextmanager
def _forked(
    target: Callable[..., None], arguments: Sequence[Any], processes: int, extra: dict[str, str], launched: bool = False
) -> Iterator[list[ForkServerProcess]]:
    """Processes that call `target(variables, *arguments)`, under torchrun's variables if `launched` or several. Killed at the end."""
    ranks: list[ForkServerProcess] = []
    with patch.dict(os.environ, environment(**extra), clear=True):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if launched or processes > 1 else None
        for rank in range(processes):
            variables = dict(os.environ)
            if store is not None:
                launcher: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
                launcher |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # the store is ours
                variables |= {name: str(value) for name, value in launcher.items()}
            ranks.append(_WARM.Process(target=target, args=(variables, *arguments)))
            ranks[-1].start()
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _first_failed(ranks: Sequence[ForkServerProcess], timeout: float) -> bool:
    """Wait until all have ended or one has failed. Returns whether that took too long."""
    end = time.monotonic() + timeout
    while not any(process.exitcode for process in ranks):
        running = [process.sentinel for process in ranks if process.exitcode is None]
        if not running:
            break
        if not wait(running, max(end - time.monotonic(), 0)):
            return True
    return False


def _enter(variables: dict[str, str], out: str, err: str) -> None:
    """What a new process of a command has: its variables, its folder, files for what it writes."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for number, place in ((1, out), (2, err)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _script(variables: dict[str, str], words: list[str], folder: str, before: Callable[[], None] | None) -> None:
    """A process of `command`."""
    place = f"{folder}/{variables.get('RANK', 0)}"
    _enter(variables, f"{place}.out", f"{place}.err")
    os.setsid()
    if "RANK" in variables:
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{place}/error.json"
    if before is not None:
        before()
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _rank(variables: dict[str, str], file: str, name: str, arguments: str, folder: str) -> None:
    """A process of `run`."""
    said = f"{folder}/{variables['RANK']}.log"
    _enter(variables, said, said)
    run_main(functools.partial(_call, file, name, arguments, folder))


def _call(file: str, name: str, arguments: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("test_module", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with distributed(60) as env:
        result = getattr(module, name)(env, **json.loads(arguments))
        (Path(folder) / f"{env.rank}.json").write_text(json.dumps(result))
