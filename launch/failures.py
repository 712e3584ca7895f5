"""What a process says of the error that ends it, and its exit status: one line for what the user can mend, a traceback for the rest."""

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from launch.agent import claim_report, end_hung_agent, leave_status
from utils.errors import ConfigError, UserError

_OURS = f"{Path(__file__).resolve().parent.parent}/"
_PEER_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|remote process (exited|has)|nccl.*abort"
    r"|wait timeout after|timed out waiting \d+ ?ms|application timeout caused pair closure|no route to host|network is unreachable",
    re.IGNORECASE,
)
_MEETINGS = ("/torch/distributed/", "/torch/autograd/", "/torch/nn/parallel/", "/torch/_ops.py", "/torch/cuda/streams.py")
"""Files of torch in which a rank that waits for others, or for its GPU, is."""
_PEER_LOST_LINE = "lost the connection to another process, which failed or was killed; its own log says why"


class LostPeer(UserError):
    """Another process of the run is gone, stuck or out of reach: this one can only end."""


_said = threading.Lock()
"""Taken, for good, by the thread that says why this process ends."""
_SAY_WITHIN = 5.0
"""Seconds after which what cannot be written is given up: the terminal, or the file system, may be what hangs."""


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that this process waited in vain for another one."""
    return isinstance(error, RuntimeError) and not isinstance(error, UserError) and _PEER_LOST.search(str(error)) is not None


def mendable(error: BaseException) -> UserError | None:
    """The line for what the machine, not the code, is short of; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        cure = "a larger --accumulation, --activation-checkpointing block, --parallel fsdp on more GPUs or a smaller --global-batch-size"
        return UserError(f"out of GPU memory ({str(error).split('. ')[0]}): try {cure}; --dry-run shows what the state takes")
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        what = " ".join(str(error).split(". ")[0].split()).rstrip(".")  # what the operation adds in which it was raised says nothing
        return UserError(f"{what}: where memory ran out, give a smaller --num-workers or data.prefetch")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return UserError(f"{error}: make room, or write elsewhere, and start the same command again to go on from the last checkpoint")
    return None


def in_words(error: BaseException) -> str:
    """An error in one line, for those who do not see its traceback."""
    known = error if isinstance(error, UserError) else mendable(error)
    text = " ".join(str(known or error).split())
    return text if known else f"{type(error).__name__}: {text}".rstrip(": ")


def report(error: BaseException) -> int:
    """Print what this process has to say of an error; returns the exit status.

    Of the processes of one torchrun agent the first to fail prints the line `error: ...`, with `[rank N]` from other ranks than 0;
    a rank that only lost its peer, or fails the same way, is silent. A process says one thing, whichever of its threads comes first.
    """
    status = 2 if isinstance(error, ConfigError) else 1
    if not _said.acquire(blocking=False):
        return status
    error = mendable(error) or error
    ours = not isinstance(error, UserError)
    silent = ours and dist.is_initialized() and lost_peer(error)
    lost = silent or isinstance(error, LostPeer)
    with suppress(OSError, ValueError):  # a full disk, or nobody reads it any more
        if ours and not silent:
            traceback.print_exception(error)
        elif claim_report():
            rank = os.environ.get("RANK", "0")
            text = _PEER_LOST_LINE if silent else " ".join(str(error).split())
            prefix = "" if rank == "0" else f"[rank {rank}] "
            if lost:
                end_hung_agent()
            sys.stderr.write(f"error: {prefix}{text}\n")
    return status


def end_process(error: BaseException) -> NoReturn:
    """End this process with what is to be said of an error, from any thread, whatever the main thread does and whatever else fails."""
    status = 2 if isinstance(error, ConfigError) else 1
    try:
        in_time(lambda: report(error), _SAY_WITHIN)
        in_time(lambda: leave_status(status), _SAY_WITHIN)
    finally:
        os._exit(status)


def in_time(action: Callable[[], object], seconds: float) -> None:
    """Do what may hang in a thread of its own, and wait `seconds` for it at most; what it raises only shows on stderr."""
    thread = threading.Thread(target=action, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there may be no more threads
        with suppress(Exception):
            action()
    else:
        thread.join(seconds)


def where(thread: threading.Thread) -> tuple[str, bool]:
    """`file:line function` of ours that a thread is in, and whether it waits there for other ranks or for its GPU."""
    frame = sys._current_frames().get(thread.ident or 0)
    waits, innermost = False, "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if innermost == "?":
            waits = any(part in file for part in _MEETINGS)
            innermost = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        if file.startswith(_OURS):
            return f"{file.removeprefix(_OURS)}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return innermost, waits


def raised_at(error: BaseException) -> str:
    """`file:line function` of ours that an error comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_OURS)]
    return f"{frames[-1].filename.removeprefix(_OURS)}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
