"""Run a function of a test file in several gloo processes under torchrun, with a time limit."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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
    """Call `function(env, **arguments)` (top level of a test file; JSON arguments) on every rank; returns each rank's JSON result."""
    with tempfile.TemporaryDirectory() as folder:
        file = function.__code__.co_filename
        done = torchrun([__file__, file, function.__name__, json.dumps(arguments), folder], processes, timeout)
        assert done.returncode == 0, done.stdout[-6000:]
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def _main(file: str, name: str, arguments: str, folder: str) -> None:
    from launch.env import distributed

    spec = importlib.util.spec_from_file_location("test_module", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with distributed(60) as env:
        result = getattr(module, name)(env, **json.loads(arguments))
        (Path(folder) / f"{env.rank}.json").write_text(json.dumps(result))
    # torch 2.15 now and then aborts while the interpreter takes its threads down, long after the work is done.
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
