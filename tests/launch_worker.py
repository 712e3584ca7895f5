"""A script as the entry scripts are, for the launch tests: `launch_worker.py CASE [RANK]`; RANK: who misbehaves (default: all)."""

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.env import Env, Stopped, distributed
from launch.run import parse_launch, run_main
from utils.errors import ConfigError, UserError


def say(line: str) -> None:
    """One write, so that the ranks' lines do not mix."""
    os.write(1, f"{line}\n".encode())


def misbehave(case: str, env: Env) -> None:
    if case == "mistake":
        raise UserError(f"the file of\nrank {env.rank} is missing")
    if case == "bug":
        raise ZeroDivisionError("ours")
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "signalled":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    if case == "alone":
        raise Stopped(agreed=False)
    if case == "threaded":
        threading.Thread(target=time.sleep, args=(600,)).start()
    if case == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    if case == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)


def train(case: str, who: str, env: Env) -> None:
    """Steps with one all-reduce each, which carries the stop flag."""
    for step in range(200):
        if step == 3 and who in ("", str(env.rank)):
            misbehave(case, env)
        flag = torch.tensor(float(env.stop.is_set()))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag.item():
            say(f"rank {env.rank} stopped at step {step}")
            raise Stopped
        if case in ("fine", "threaded") and step == 10:
            return
        if case == "patient" and step == 0:
            say(f"{os.getpid()}")
        time.sleep(0.3 if case == "patient" else 0.01)


def main() -> None:
    launch = parse_launch("A test.")
    case, who = [*launch.argv, ""][:2]
    if case == "settings":
        raise ConfigError("--lr fast: not a number")
    with distributed(30.0) as env:
        train(case, who, env)
        say(f"rank {env.rank} of {env.world_size} local {env.local_rank} argv {launch.argv}")


if __name__ == "__main__":
    run_main(main)
