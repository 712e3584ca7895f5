"""The torchrun agent that started this process: neither may outlive the other, and what it does not tell those that started it."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from utils.errors import UserError

AGENT_GRACE = 15.0
"""Seconds that an agent has to end after a process of its has reported a lost one."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_GUARD = """
import os, pathlib, select, signal, sys
agent, seconds, worker = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if not select.select([agent], [], [], seconds)[0]:
    place = pathlib.Path("/proc", worker, "stat")
    if not worker or (place.is_file() and place.read_text().rpartition(")")[2].split()[0] == "Z"):
        signal.pidfd_send_signal(agent, signal.SIGKILL)
"""


class _Agent:
    """A handle of the agent that cannot come to mean another process, as its number could."""

    handle: int | None = None


_agent = _Agent()


def under_agent() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def starter() -> str:
    """What tells that which started this process, and may start it again, from others of all machines and times: KINOFORM_LAUNCH of the
    launch scripts, else the agent, else (by hand) nothing."""
    given = os.environ.get("KINOFORM_LAUNCH", "")
    if given or not under_agent():
        return given
    agent = os.getppid()
    with suppress(OSError):
        # <process> (<name, which may hold spaces>) <state> ...: the 22nd word is when it began, in ticks since the host did
        began = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{socket.gethostname()}-{agent}-{began}"
    return f"{socket.gethostname()}-{agent}"


def follow_agent() -> None:
    """Have this process killed when the agent that started it is: workers have sessions of their own, so a signal to the agent's
    process group misses them, and they would go on writing to the run that the next start continues."""
    if not under_agent() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if _adopted(os.getppid()):
        raise UserError("the torchrun agent that started this process is gone")
    if _agent.handle is None:
        with suppress(OSError):  # an old kernel
            _agent.handle = os.pidfd_open(os.getppid())


def end_hung_agent(grace: float = AGENT_GRACE) -> None:
    """Have the agent killed if it is still there `grace` seconds from now: one that lost its link to the other agents hangs in a
    read from their store, deaf to SIGTERM, and does not even notice that its workers are gone.

    One that may start its workers again is spared when it has noticed the end of this process.
    """
    if _agent.handle is None:
        return
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    command = [sys.executable, "-I", "-S", "-c", _GUARD, str(_agent.handle), str(grace), str(os.getpid()) if restarts else ""]
    with suppress(OSError):
        subprocess.Popen(
            command,
            pass_fds=(_agent.handle,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def claim_report() -> bool:
    """Take the right to report an error, if no other process of this agent has it; whether this one does. Without an agent: always."""
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


def leave_status(status: int | None) -> None:
    """Write a process's exit status to its file in the folder KINOFORM_STATUS_DIR; None: take away what is there.

    torchrun makes every status of its workers 1. What started it reads here whether to start it again. Without the folder: nothing.
    """
    with suppress(OSError):  # a full disk must not hide the error that is being reported
        _leave(_status_file(), status)


def leave_start(checkpoint: str) -> None:
    """Say in the folder KINOFORM_STATUS_DIR that this process trains, and from which checkpoint on: what starts it again sees by
    that whether the start before has got on."""
    try:
        _leave(_status_file(), "training")
        _leave("begun", checkpoint)
    except OSError as error:
        sys.stderr.write(f"warning: cannot write to KINOFORM_STATUS_DIR ({error}): mount it in the container\n")


def _status_file() -> str:
    # Not by the rank: in an elastic launch a process can have another one after each start. Slurm's tasks share the folder.
    return f"{os.environ.get('SLURM_PROCID', '0')}-{os.environ.get('LOCAL_RANK', '0')}"


def _leave(name: str, text: object) -> None:
    place = os.environ.get("KINOFORM_STATUS_DIR", "")
    if not place:
        return
    if text is None:
        (Path(place) / name).unlink(missing_ok=True)
    else:
        (Path(place) / name).write_text(f"{text}\n")


def _adopted(parent: int) -> bool:
    """Whether `parent` is one of those that take in orphans, and not an agent that is process 1 of a container."""
    try:
        takes_orphans = parent == 1 or Path(f"/proc/{parent}/comm").read_text().strip() == "systemd"
        return takes_orphans and not Path(f"/proc/{parent}/exe").samefile("/proc/self/exe")
    except OSError:
        return parent == 1
