"""From a command line to processes and back to an exit status: the launcher's flags, the start through torchrun, errors in one line.

Exit status: 0 done; 1 error; 2 wrong configuration; 75 stopped by a signal and saved; 130 interrupted.
"""

import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from launch.env import EXIT_STOPPED, Env, Stopped, check_master, had_process_group
from utils.errors import ConfigError, UserError

LAUNCH_HELP = """Launcher options, given to the script itself (under torchrun they are ignored):
  --nnodes N             nodes of the run (default 1); this or the next flag starts torchrun
  --nproc_per_node G     processes per node: a number, or `gpu` for one per GPU (default 1)
  --node_rank R          which of several nodes this is, from 0
  --master_addr HOST     name or address of node 0, known to every node
  --master_port PORT     free port on node 0 (default 29500)
  --dry-run              print the configuration, of a training run also sizes and memory per GPU, and stop
  --print-config         print the resolved configuration as YAML, and stop
"""

_VALUE_FLAGS = ("nnodes", "nproc_per_node", "node_rank", "local_rank", "master_addr", "master_port")
_SWITCHES = ("dry_run", "print_config")
_PEER_LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|remote process (exited|has)|nccl.*abort", re.IGNORECASE)
_PEER_LOST_LINE = "lost the connection to another process, which failed or was killed; its own log says why"


@dataclass(frozen=True)
class Launch:
    """A command line without its launcher flags."""

    argv: list[str]
    """What is left for `utils.config.load_config`."""
    world_size: int
    """Processes of the run that was asked for (of this run, under torchrun)."""
    local_world_size: int
    dry_run: bool
    print_config: bool
    about: str
    """What --help says of the script before it lists the settings."""

    def env(self) -> Env:
        """Rank 0 of the run that was asked for, without a process group: for --dry-run."""
        return Env(0, self.world_size, 0, self.local_world_size, torch.device("cpu"), "gloo")


def parse_launch(description: str, argv: list[str] | None = None) -> Launch:
    """Take the launcher flags off the command line (`sys.argv[1:]`); start again through torchrun when they ask for it.

    Does not return in that case. Under torchrun (RANK is set), and for --help, --dry-run and --print-config, nothing is started.
    `description`: what the script is. Raises ConfigError for a value that cannot be.
    """
    given, rest = _split(sys.argv[1:] if argv is None else argv)
    dry_run, print_config = "dry_run" in given, "print_config" in given
    wants_help = "-h" in rest or "--help" in rest
    if "RANK" in os.environ:
        if (wants_help or dry_run or print_config) and os.environ["RANK"] != "0":
            raise SystemExit(0)  # one rank prints
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    else:
        local = _processes(given.get("nproc_per_node", "1"))
        world_size = local * _number(given, "nnodes", 1)
    starts = "nnodes" in given or "nproc_per_node" in given
    if starts and "RANK" not in os.environ and not (wants_help or dry_run or print_config):
        _start_torchrun(given, local, rest)
    return Launch(rest, world_size, local, dry_run, print_config, f"{description.strip()}\n\n{LAUNCH_HELP}")


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the process with the documented status; a user's mistake is one line on stderr, from one rank.

    The line is `error: ...`, with `[rank N]` from other ranks than 0. Of the processes of one torchrun agent the first to fail
    prints; a rank that only lost its peer, or fails the same way, is silent. Other exceptions are ours and keep their traceback.
    As torchrun does not hand on the status of its workers, status 75 also creates the file named by KINOFORM_STOPPED_FILE, if set.
    """
    status = 0
    try:
        main()
    except Stopped as stop:
        status = 130 if stop.received == signal.SIGINT else EXIT_STOPPED
        if status == EXIT_STOPPED and os.environ.get("KINOFORM_STOPPED_FILE"):
            Path(os.environ["KINOFORM_STOPPED_FILE"]).touch()
    except SystemExit as end:
        status = _report(UserError(end.code)) if isinstance(end.code, str) else int(end.code or 0)
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:  # also torch's CheckpointException, which is no Exception
        status = _report(_mendable(error) or error)
    _end(status)


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Launcher flags (either spelling, `--flag value` or `--flag=value`) and the other arguments, in order."""
    given: dict[str, str] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in _SWITCHES and not equals:
            given[name] = ""
        elif name in _VALUE_FLAGS:
            given[name] = value if equals else next(arguments, "")
            if not given[name]:
                raise ConfigError(f"{flag} needs a value")
        else:
            rest.append(argument)
    return given, rest


def _number(given: dict[str, str], name: str, default: int, lowest: int = 1) -> int:
    text = given.get(name, str(default))
    if not text.isdecimal() or int(text) < lowest:
        raise ConfigError(f"--{name} {text}: must be a whole number, {lowest} or more")
    return int(text)


def _processes(text: str) -> int:
    if text in ("gpu", "auto"):
        return max(torch.cuda.device_count(), 1)
    return _number({"nproc_per_node": text}, "nproc_per_node", 1)


def _start_torchrun(given: dict[str, str], local: int, rest: list[str]) -> NoReturn:
    nodes = _number(given, "nnodes", 1)
    where = ["--standalone"]
    if nodes > 1:
        if "master_addr" not in given or "node_rank" not in given:
            raise ConfigError(f"--nnodes {nodes} needs --node_rank and --master_addr on every node (or use torchrun, or slurm/)")
        node_rank = _number(given, "node_rank", 0, lowest=0)
        if node_rank >= nodes:
            raise ConfigError(f"--node_rank {node_rank}: must be below --nnodes {nodes}")
        port = _number(given, "master_port", 29500)
        check_master(given["master_addr"], port)
        where = [f"--node-rank={node_rank}", f"--master-addr={given['master_addr']}", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={local}", *where, "--max-restarts=0"]
    command.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # passed on; its default leaves out SIGUSR1 and dies of it
    # A restart inside torchrun can meet the addresses of dead peers in the agents' shared store.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ}
    # The lone -- keeps torchrun from reading flags of the script as abbreviations of its own (--run).
    os.execve(sys.executable, [*command, "--", sys.argv[0], *rest], environment)


def _mendable(error: BaseException) -> UserError | None:
    """The line for what the machine, not the code, is short of; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        cure = "a larger --accumulation, --activation-checkpointing block, --parallel fsdp on more GPUs or a smaller --global-batch-size"
        return UserError(f"out of GPU memory ({str(error).split('. ')[0]}): try {cure}; --dry-run shows what the state takes")
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        what = " ".join(str(error).split()).rstrip(". ")
        return UserError(f"{what}: where memory ran out, give a smaller --num-workers or data.prefetch")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return UserError(f"{error}: make room, or write elsewhere, and start the same command again to go on from the last checkpoint")
    return None


def _report(error: BaseException) -> int:
    """Print what this process has to say of an error; returns the exit status."""
    status = 2 if isinstance(error, ConfigError) else 1
    ours = not isinstance(error, UserError)
    peer_lost = ours and isinstance(error, RuntimeError) and dist.is_initialized() and _PEER_LOST.search(str(error)) is not None
    first = _first_to_fail()
    rank = os.environ.get("RANK", "0")
    if ours and not peer_lost:
        traceback.print_exception(error)
    elif first:
        text = _PEER_LOST_LINE if peer_lost else " ".join(str(error).split())
        prefix = "" if rank == "0" else f"[rank {rank}] "
        sys.stderr.write(f"error: {prefix}{text}\n")
    return status


def _first_to_fail() -> bool:
    """Whether no other process of this torchrun agent has reported an error before. Without an agent: always."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not place:
        return True
    try:
        # <folder of the agent's attempt>/<local rank>/error.json
        (Path(place).parent.parent / "kinoform_reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _end(status: int) -> NoReturn:
    """End with a status; after a process group without the interpreter's teardown.

    Where the group is still there, peers may be waiting for this process in a collective. Where it is not, torch 2.15 aborts now
    and then while the interpreter takes its threads down, long after the work is done.
    """
    if not had_process_group():
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
