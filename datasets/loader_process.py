"""What the loader's processes need beside their samples."""

import os
import signal
import tempfile
import threading

from utils.errors import ConfigError

MAX_TEMPORARY = 75
"""Characters of TMPDIR: the path of a socket has at most 107, of which multiprocessing's own names take 32."""


def check_temporary() -> None:
    """Raises ConfigError where TMPDIR is too long for the sockets by which processes hand tensors over: they would hang."""
    place = tempfile.gettempdir()
    if len(place) > MAX_TEMPORARY:
        raise ConfigError(f"TMPDIR {place} is longer than {MAX_TEMPORARY} characters, too long for the sockets of --num-workers")


def obey_parent_only(worker: int) -> None:
    """In a loader process: signals of a launcher or a terminal, which reach all processes of a run, are left to the parent.

    It still needs its samples to end the step and save. SIGTERM from the parent itself ends the process, as multiprocessing expects.
    """
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    if not hasattr(signal, "sigwaitinfo"):  # macOS: no way to tell who sent it
        for number in numbers - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def serve() -> None:
        while True:
            info = signal.sigwaitinfo(numbers)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=serve, name="signals", daemon=True).start()
