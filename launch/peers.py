"""The other processes of a run: who is there, and who is missing.

A thread of each rank answers the questions of the others, whatever its main thread does. Another holds a connection to the next rank,
the end of which tells at once of the death of that one. A rank that loses the others finds out whom the run waits for and tells all
of them, so that every host's log names the same rank; those that cannot end by themselves are ended by their thread.
"""

import json
import math
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from launch.accusation import Answer, Place, accusation
from launch.addresses import own_address
from launch.failures import LostPeer, end_process, in_words, lost_peer, raised_at, where

T = TypeVar("T")

ANSWER_WITHIN = 3.0
"""Seconds that a rank has to answer a question."""
GRACE = 5.0
"""Seconds that the main thread has to end by itself once a rank is lost."""
HEARSAY = 1.0
"""Seconds that a rank waits for the word of one who knows more, before it asks around."""
_PROBE_EVERY = 10
"""Seconds, at most, between the kernel's questions to the host of the next rank."""
_THREADS = 16
"""Ranks that are asked at a time."""
_LONGEST = 65536
"""Bytes of a question, at most."""


@dataclass
class _Visitor:
    """A connection that another rank, or a stranger, opened, and what of it was not answered yet."""

    connection: socket.socket
    text: bytes = b""


class Peers:
    """Making one is a collective. `timeout`: seconds out of reach after which the host of the next rank counts as lost."""

    def __init__(self, rank: int, world_size: int, local_world_size: int, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.step: int | None = None
        """The optimiser step this rank is in, for the others to know."""
        self.resting = False
        """Whether this rank is between two steps, at work that the others may have to wait for."""
        self.before_end: Callable[[], None] | None = None
        """What the thread does before it ends the process."""
        self._timeout = timeout
        self._leaving = False
        self._lost_at = ""
        self._mutex, self._told = threading.Lock(), threading.Event()
        self._verdict = ""
        self._deadline = math.inf
        address = own_address(several_nodes=world_size > local_world_size)
        self._listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=1024)
        self._listener.setblocking(False)
        self._own = Place(rank, socket.gethostname(), os.getpid(), address, self._listener.getsockname()[1])
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, (self._own, secrets.token_hex(8)))
        self._places: list[Place] = [place for place, _ in gathered]
        self._secret: str = gathered[0][1]
        self._next = self._places[(rank + 1) % world_size]
        self._visitors: dict[int, _Visitor] = {}
        self._followed: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        # A forked process, such as one of a loader, must not keep connections alive that tell of the life of this one.
        os.register_at_fork(after_in_child=self._close)
        self._thread = threading.Thread(target=self._serve, name="peers", daemon=True)
        self._thread.start()
        threading.Thread(target=self._follow, name="peers-follow", daemon=True).start()

    def explain(self, error: BaseException) -> LostPeer | None:
        """What to say in place of an error that only tells of a lost connection; the others are told of any other error."""
        if lost_peer(error):
            self._lost_at = raised_at(error)
            return LostPeer(self.accuse("the ranks lost each other" + (f" in step {self.step + 1}" if self.step is not None else "")))
        if not isinstance(error, LostPeer):
            self.tell(f"{self._own} failed: {in_words(error)[:500]}")
        return None

    def accuse(self, what: str, hint: str = "") -> str:
        """One line: `what` happened, whom the run waits for, and a hint. The first that any rank has found out holds for all."""
        # All ranks come here at about the same time: the first asks, the later ones only when none before them could tell.
        if self._told.wait(HEARSAY + ANSWER_WITHIN * math.log2(1 + self.rank)):
            return self._verdict
        text, deaf = what, set[int]()
        with suppress(Exception):  # such as of a process that may have no more threads: the run ends without a name then
            answers = self._of_all(self._ask)
            text = f"{what}: {accusation([*answers, Answer(self._own, state=self._state())])}{hint}"
            deaf = {answer.place.rank for answer in answers if answer.trouble}
        self.tell(text, deaf)
        return self._verdict or text

    def tell(self, verdict: str, deaf: Collection[int] = ()) -> None:
        """Let all ranks but those that would not hear it know why the run ends, unless a reason is known already."""
        if self._believe(verdict):
            message = f"{self._secret} verdict {json.dumps(verdict)}\n"
            with suppress(Exception):
                self._of_all(lambda place: self._question(place, message), deaf)

    def rests(self, rank: int) -> bool:
        """Whether a rank says that it is between two steps, alive and at work."""
        return bool(self._ask(self._places[rank]).state.get("resting"))

    def leave(self) -> None:
        """The run is over for all: from now on nobody is missed."""
        self._leaving = True
        with suppress(OSError):
            self._connect(self._own).close()  # wakes the thread
        self._thread.join(ANSWER_WITHIN)
        if self._followed is not None:
            with suppress(OSError):
                self._followed.shutdown(socket.SHUT_RDWR)
        self._close()

    def _close(self) -> None:
        with suppress(OSError):
            self._selector.close()
        for connection in (self._listener, self._followed, *(visitor.connection for visitor in self._visitors.values())):
            if connection is not None:
                with suppress(OSError):
                    connection.close()

    def _of_all(self, call: Callable[[Place], T], deaf: Collection[int] = ()) -> list[T]:
        """Results of a call for each of the other ranks, many at a time."""
        others = [place for place in self._places if place.rank != self.rank and place.rank not in deaf]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(call, others))

    def _believe(self, verdict: str) -> bool:
        """Take a verdict for true; false when there is one already, or nobody is to be missed."""
        with self._mutex:
            if self._verdict or self._leaving:
                return False
            self._verdict = verdict
        self._told.set()
        return True

    def _state(self) -> dict[str, Any]:
        at, waits = (self._lost_at, True) if self._lost_at else where(threading.main_thread())
        return {"step": self.step, "at": at, "waits": waits, "resting": self.resting}

    def _connect(self, place: Place) -> socket.socket:
        return socket.create_connection((place.address, place.port), timeout=ANSWER_WITHIN)

    def _question(self, place: Place, message: str) -> str:
        """The answer of a rank; raises nothing: an empty one, or the name of what went wrong after a colon."""
        try:
            with self._connect(place) as connection:
                connection.sendall(message.encode())
                try:
                    return connection.makefile("rb").readline().decode() or ":gone"
                except TimeoutError:
                    return ":silent"
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            return ":gone"
        except OSError:
            return ":unreachable"

    def _ask(self, place: Place) -> Answer:
        text = self._question(place, f"{self._secret} state\n")
        try:
            return Answer(place, trouble=text[1:]) if text.startswith(":") else Answer(place, state=dict(json.loads(text)))
        except (ValueError, TypeError):  # cut in the middle, or of another program that has the port now
            return Answer(place, trouble="gone")

    def _serve(self) -> None:
        while not self._leaving:
            try:
                for key, _ in self._selector.select(0.5):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._hear(self._visitors[key.fd])
            except Exception:  # whatever strangers send or the system is short of: the others must go on finding this rank
                time.sleep(0.1)
            if time.monotonic() > self._deadline:
                with suppress(Exception):
                    if self.before_end is not None:
                        self.before_end()
                end_process(LostPeer(self._verdict))
        for visitor in self._visitors.values():
            with suppress(OSError):
                visitor.connection.sendall(b"bye\n")

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._visitors[connection.fileno()] = _Visitor(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, visitor: _Visitor) -> None:
        """Answer what another rank asks; forget it when it closes, or does not know the secret."""
        try:
            data = visitor.connection.recv(_LONGEST)
            visitor.text += data
            while b"\n" in visitor.text:
                question, visitor.text = visitor.text.split(b"\n", 1)
                visitor.connection.sendall(self._answer(question).encode())
            if data and len(visitor.text) < _LONGEST:
                return
        except (OSError, ValueError):
            pass
        del self._visitors[visitor.connection.fileno()]
        self._selector.unregister(visitor.connection)
        visitor.connection.close()

    def _answer(self, question: bytes) -> str:
        """Raises ValueError for a question of somebody else."""
        secret, _, rest = question.partition(b" ")
        if not secrets.compare_digest(secret, self._secret.encode()):
            raise ValueError("not one of us")
        kind, _, content = rest.partition(b" ")
        if kind == b"state":
            return json.dumps(self._state()) + "\n"
        if kind == b"verdict" and self._believe(json.loads(content)):
            self._deadline = time.monotonic() + GRACE
        return "yes\n"

    def _follow(self) -> None:
        """Hold a connection to the next rank; tell the others when it ends and the rank does not answer any more."""
        while True:
            try:
                self._followed = self._connect(self._next)
            except OSError:  # without it the death of the next rank shows later, by a timeout
                return
            with suppress(OSError):
                self._followed.settimeout(None)
                _keep_alive(self._followed, self._timeout)
                if self._followed.recv(1):  # it says bye
                    return
            if self._leaving:
                return
            self._followed.close()
            answer = self._ask(self._next)
            if answer.trouble in ("gone", "unreachable"):
                self.tell(f"the run lost a rank: {accusation([answer])}")
                self._deadline = time.monotonic() + GRACE
                return
            time.sleep(HEARSAY)


def _keep_alive(connection: socket.socket, timeout: float) -> None:
    """Have the kernel end a connection whose other host has been out of reach for `timeout` seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, min(_PROBE_EVERY, int(timeout / 4)))
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_USER_TIMEOUT", min(int(timeout * 1000), 2**31 - 1))):
        if hasattr(socket, name):  # as on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
