"""Run a function of a test file in several gloo processes, or a script under torchrun, with a time limit."""

import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


def run(function: Callable[..., Any], processes: int = 2, timeout: float = 120, **arguments: Any) -> list[Any]:
    """Call `function(env, **arguments)` (top level of a test file; JSON arguments) on every rank; returns each rank's JSON result.

    The ranks are forked from a process that has imported torch and the engine, which takes most of the time of a start under torchrun.
    Ends all of them when one fails, and raises AssertionError with what they said.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, environment(), clear=True):
        call = (function.__code__.co_filename, function.__name__, json.dumps(arguments), folder)
        ranks: list[ForkServerProcess] = []
        for rank in range(processes):
            launcher: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            launcher |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # the store is ours
            variables = dict(os.environ) | {name: str(value) for name, value in launcher.items()}
            ranks.append(_WARM.Process(target=_rank, args=(variables, *call)))
            ranks[-1].start()
        end = time.monotonic() + timeout
        while not any(process.exitcode for process in ranks):
            running = [process.sentinel for process in ranks if process.exitcode is None]
            if not running or not wait(running, max(end - time.monotonic(), 0)):
                break
        for process in ranks:
            process.kill()
            process.join()
        said = "".join(place.read_text(errors="replace") for place in sorted(Path(folder).glob("*.log")))
        statuses = [process.exitcode for process in ranks]
        assert not any(statuses), f"exit statuses {statuses}\n{said[-6000:]}"
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def _rank(variables: dict[str, str], file: str, name: str, arguments: str, folder: str) -> None:
    """One rank, in a process of its own."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    said = os.open(f"{folder}/{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    run_main(functools.partial(_call, file, name, arguments, folder))


def _call(file: str, name: str, arguments: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("test_module", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with distributed(60) as env:
        result = getattr(module, name)(env, **json.loads(arguments))
        (Path(folder) / f"{env.rank}.json").write_text(json.dumps(result))
