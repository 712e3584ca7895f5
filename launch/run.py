"""From a command line to processes and back to an exit status: the launcher's flags, the start through torchrun, errors in one line.

Exit status: 0 done; 1 error; 2 wrong configuration; 75 stopped by a signal and saved; 130 interrupted.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch

from launch.agent import leave_status
from launch.env import EXIT_STOPPED, Env, Stopped, check_master, had_process_group
from launch.failures import report
from utils.errors import ConfigError, UserError

LAUNCH_HELP = """Launcher options, given to the script itself (under torchrun they are ignored):
  --nnodes N             nodes of the run (default 1), or lowest:highest; this or the next flag starts torchrun
  --nproc_per_node G     processes per node: a number, or `gpu` for one per GPU (default 1)
  --node_rank R          which of several nodes this is, from 0
  --master_addr HOST     name or address of node 0, known to every node
  --master_port PORT     free port on node 0 (default 29500)
  --dry-run              print the configuration, of a training run also sizes and memory per GPU, and stop
  --print-config         print the resolved configuration as YAML, and stop
"""

_VALUE_FLAGS = ("nnodes", "nproc_per_node", "node_rank", "local_rank", "master_addr", "master_port")
_SWITCHES = ("dry_run", "print_config")


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
        world_size = local * _nodes(given)[1]
    starts = "nnodes" in given or "nproc_per_node" in given
    if starts and "RANK" not in os.environ and not (wants_help or dry_run or print_config):
        _start_torchrun(given, local, rest)
    return Launch(rest, world_size, local, dry_run, print_config, f"{description.strip()}\n\n{LAUNCH_HELP}")


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the process with the documented status; a user's mistake is one line on stderr, from one rank.

    Other exceptions are ours and keep their traceback (see `launch.failures.report`).
    As torchrun does not hand on the status of its workers, it also goes to the folder KINOFORM_STATUS_DIR (`launch.agent.leave_status`).
    """
    leave_status(None)
    status = 0
    try:
        main()
    except Stopped as stop:
        status = 130 if stop.received == signal.SIGINT else EXIT_STOPPED
    except SystemExit as end:
        status = report(UserError(end.code)) if isinstance(end.code, str) else int(end.code or 0)
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:  # also torch's CheckpointException, which is no Exception
        status = report(error)
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


def _nodes(given: dict[str, str]) -> tuple[int, int]:
    """Lowest and highest number of nodes."""
    lowest, _, highest = given.get("nnodes", "1").partition(":")
    least = _number({"nnodes": lowest}, "nnodes", 1)
    return least, _number({"nnodes": highest or lowest}, "nnodes", 1, lowest=least)


def _processes(text: str) -> int:
    if text in ("gpu", "auto"):
        return max(torch.cuda.device_count(), 1)
    return _number({"nproc_per_node": text}, "nproc_per_node", 1)


def _start_torchrun(given: dict[str, str], local: int, rest: list[str]) -> NoReturn:
    least, nodes = _nodes(given)
    where = ["--standalone"] if nodes == 1 else _meeting_point(given, least, nodes)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={least}:{nodes}", f"--nproc-per-node={local}", *where]
    command.append("--max-restarts=0")
    command.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # passed on; its default leaves out SIGUSR1 and dies of it
    # A restart inside torchrun can meet the addresses of dead peers in the agents' shared store.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "KINOFORM_NODES": str(nodes), **os.environ}
    # The lone -- keeps torchrun from reading flags of the script as abbreviations of its own (--run).
    os.execve(sys.executable, [*command, "--", sys.argv[0], *rest], environment)


def _meeting_point(given: dict[str, str], least: int, nodes: int) -> list[str]:
    """torchrun's flags by which the nodes find each other: by their ranks where all must be there, else by who comes."""
    if "master_addr" not in given or ("node_rank" not in given and least == nodes):
        needed = "--node_rank and --master_addr" if least == nodes else "--master_addr"
        raise ConfigError(f"--nnodes {given['nnodes']} needs {needed} on every node (or use launch/multi_node.sh, torchrun, or slurm/)")
    address, port = given["master_addr"], _number(given, "master_port", 29500)
    check_master(address, port)
    if least < nodes:
        return ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", "--rdzv-id=kinoform"]
    node_rank = _number(given, "node_rank", 0, lowest=0)
    if node_rank >= nodes:
        raise ConfigError(f"--node_rank {node_rank}: must be below --nnodes {nodes}")
    return [f"--node-rank={node_rank}", f"--master-addr={address}", f"--master-port={port}"]


def _end(status: int) -> NoReturn:
    """End with a status; after a process group without the interpreter's teardown.

    Where the group is still there, peers may be waiting for this process in a collective. Where it is not, torch 2.15 aborts now
    and then while the interpreter takes its threads down, long after the work is done.
    """
    leave_status(status)
    if not had_process_group():
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
