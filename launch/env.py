"""The processes of a run: ranks, device, process group, signals. Nothing else in the project initialises `torch.distributed`."""

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launch.agent import follow_agent
from launch.peers import Peers
from utils.errors import UserError

EXIT_STOPPED = 75
"""Exit status of a run that a signal stopped after it saved: start the same command again (EX_TEMPFAIL)."""

_ROOT = Path(__file__).resolve().parent.parent
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_FLIGHT_RECORDER = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""NCCL keeps its last collectives, and writes them down when one times out (the engine says where)."""


class Stopped(Exception):
    """The run was asked to stop and has saved what it had to."""

    received: signal.Signals | None = None
    """The signal that this rank received; None on ranks that only followed the others."""

    def __init__(self, *, agreed: bool = True) -> None:
        """`agreed`: all ranks raise it at the same place, as the engine does; else this one leaves without meeting the others."""
        super().__init__("stopped by a signal")
        self.agreed = agreed


class StopFlag:
    """Set by the first SIGTERM, SIGUSR1 or SIGINT that this process receives. Ranks must agree on it before they act on it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def set(self, number: int = signal.SIGTERM) -> None:
        """Ask for a stop; later calls change nothing."""
        if self.received is None:
            self.received = signal.Signals(number)

    def is_set(self) -> bool:
        return self.received is not None

    def __bool__(self) -> bool:
        return self.is_set()


class _History:
    """What this process has done."""

    initialised = False


_history = _History()


@dataclass(frozen=True)
class Env:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str
    """Of the default group: "gloo", or "cpu:gloo,cuda:nccl" with GPUs."""
    stop: StopFlag = field(default_factory=StopFlag)
    peers: Peers | None = None
    """The other processes, where there are any and they wait for each other."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.rank == 0

    @classmethod
    def single(cls, device: str = "cpu") -> "Env":
        """One process without a process group, for tools and tests."""
        return cls(0, 1, 0, 1, torch.device(device), "gloo")


@contextmanager
def distributed(timeout: float) -> Iterator[Env]:
    """The process group of the run, for the time of the block; one process without torchrun gets a group of one.

    `timeout`: seconds after which a collective that a rank does not join is an error. On a clean end (also an agreed `Stopped`)
    the ranks meet in a barrier first: a group torn down while a peer still uses it aborts the peer. After an error there is no
    meeting: the others are told, and the process should end at once, which frees them (see `launch.run.run_main`).
    Raises UserError for a master address that cannot be resolved or reached and for a missing GPU, and LostPeer, which names it, in
    place of an error of a collective that another rank has left.
    """
    check_packages()
    env = _read_environment()
    follow_agent()
    # A signal until then ends the process at once: there is nothing to save, and Python would not hear it while it waits for the others.
    _initialise(env, timeout)
    restore = _install_handlers(env.stop)
    try:
        if env.world_size > 1:
            env = replace(env, peers=Peers(env.rank, env.world_size, env.local_world_size, timeout))
        yield env
    except Stopped as stopped:
        stopped.received = env.stop.received
        if stopped.agreed or env.peers is None:
            _leave(env)
        else:
            env.peers.explain(stopped)
        raise
    except SystemExit as end:
        if end.code in (None, 0, EXIT_STOPPED):
            _leave(env)
        raise
    except BaseException as error:
        if env.world_size == 1:
            dist.destroy_process_group()
        else:
            restore.clear()  # torchrun's SIGTERM for the end of another rank must not come before this one has said why it ends
        if env.peers is not None and (lost := env.peers.explain(error)):
            raise lost from error
        raise
    else:
        _leave(env)
    finally:
        for number, handler in restore.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def independent() -> Env:
    """This process among those of a launch which do not wait for each other: its place and device, no process group, no handlers.

    Raises UserError as `distributed` does.
    """
    check_packages()
    env = _read_environment()
    follow_agent()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # ignored by what starts the processes of a Slurm job; there is nothing to save here
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
    return env


def check_packages() -> None:
    """Raise UserError when `datasets`, `models` or `utils` is another project's package, imported before ours."""
    for name in ("datasets", "models", "utils"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin or ""]]
        if _ROOT / name not in places:
            found = ", ".join(map(str, places)) or "nothing"
            raise UserError(
                f"the package `{name}` is not Kinoform's ({found} was found first): start a fresh process with {_ROOT} first on PYTHONPATH"
            )


def check_master(address: str, port: int) -> None:
    """Raise UserError when the name of the master node has no address on this node."""
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve the master address {address!r} ({error.strerror or error}): "
            "give --master_addr a host name or IP address that every node knows"
        ) from None


def _read_environment() -> Env:
    if "RANK" not in os.environ:
        rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
    else:
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        except (KeyError, ValueError) as error:
            raise UserError(f"RANK is set but not all of the launcher's variables ({error}): start with torchrun, or unset RANK") from None
    if not torch.cuda.is_available():
        return Env(rank, world_size, local_rank, local_world_size, torch.device("cpu"), "gloo")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{socket.gethostname()} has {torch.cuda.device_count()} GPU(s) but {local_world_size} processes were started on it: "
            "lower --nproc_per_node, or set CUDA_VISIBLE_DEVICES"
        )
    return Env(rank, world_size, local_rank, local_world_size, torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl")


def had_process_group() -> bool:
    """Whether this process has been in a process group, or still is."""
    return _history.initialised


def _initialise(env: Env, timeout: float) -> None:
    _history.initialised = True
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
        for name, value in _FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
    limit = timedelta(seconds=timeout)
    if env.world_size == 1:
        dist.init_process_group(env.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    if env.world_size > env.local_world_size:
        check_master(address, int(port))
    try:
        dist.init_process_group(env.backend, timeout=limit)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {env.rank} on {socket.gethostname()} could not meet the {env.world_size - 1} other process(es) "
            f"at {address}:{port} ({reason}): check that all nodes run the command, "
            "that the port is open, and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"
        ) from None


def _leave(env: Env) -> None:
    # NCCL would guess the device of a rank that has used it for nothing yet.
    dist.barrier(device_ids=[env.device.index] if env.device.type == "cuda" else None)
    if env.peers is not None:
        env.peers.leave()
    dist.destroy_process_group()


def _install_handlers(stop: StopFlag) -> dict[signal.Signals, Any]:
    """Handlers that set the flag; returns the ones they replace. A second SIGINT interrupts at once."""
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked process inherits the handler. What stops its parent may reach it too, but only SIGTERM is meant for it.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGINT and stop.received == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set(number)

    replaced = {number: signal.signal(number, handle) for number in _SIGNALS}
    _spare_children()
    return replaced


def _spare_children() -> None:
    """Keep SIGUSR1, which Slurm sends to every process of a step, from programs that this process starts (compilers, say): they do not
    inherit the handler, and would die, but they do inherit what the main thread blocks. Another thread takes the signal for it."""

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        threading.Event().wait()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=take, name="kinoform-signals", daemon=True).start()
