"""Fetching the shards of coming batches in the background, while the samples of earlier ones are used."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from contextlib import suppress

import numpy as np

from datasets.order import Order
from utils.errors import UserError

FETCHES = 4
"""Shards that are fetched at a time."""


class Lookahead:
    """Walks the order ahead of a rank and fetches the shards it will need, `ahead` at most before their time.

    Trouble is left to the reader, which meets the same shard and reports it. The threads end with `close`.
    """

    def __init__(
        self,
        order: Order,
        wanted: Callable[[int], np.ndarray],
        fetch: Callable[[int], object],
        *,
        first_step: int,
        ahead: int,
        bad: Container[int] = (),
    ) -> None:
        """`wanted(step)`: shards of what the rank reads in a step; `fetch(shard)` blocks until it is there; `bad` shards are left alone."""
        self._order, self._wanted, self._fetch, self._ahead, self._bad = order, wanted, fetch, ahead, bad
        self._reached = first_step
        self._planned = first_step
        self._queue: deque[tuple[int, int]] = deque()
        self._early: deque[int] = deque()
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True) for i in range(FETCHES)]
        for thread in self._threads:
            thread.start()

    def reached(self, step: int) -> None:
        """The batches before `step` have been taken. Never waits."""
        if step == self._reached:
            return
        self._reached = step
        if self._changed.acquire(blocking=False):
            self._changed.notify_all()
            self._changed.release()

    def close(self) -> None:
        """End the threads; one that is in the middle of a fetch ends after it."""
        self._closed = True
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            with suppress(UserError, OSError):
                self._fetch(shard)

    def _next(self) -> int | None:
        """The next shard to fetch, once it is time for it; None when the stream is closed."""
        with self._changed:
            while not self._closed:
                while self._early and self._early[0] <= self._reached:
                    self._early.popleft()
                if self._queue and len(self._early) < self._ahead:
                    step, shard = self._queue.popleft()
                    self._early.append(step)
                    return shard
                if not self._queue and self._planned - self._reached <= self._order.steps_per_epoch:
                    self._plan()
                else:
                    self._changed.wait(0.5)  # `reached` may find the lock taken and wake nobody
            return None

    def _plan(self) -> None:
        """Queue the shards of one more step that were not wanted lately."""
        for shard in np.unique(self._wanted(self._planned)).tolist():
            if shard not in self._recent and shard not in self._bad:
                self._queue.append((self._planned, shard))
            self._recent[shard] = None
            self._recent.move_to_end(shard)
        while len(self._recent) > 2 * self._ahead:
            self._recent.popitem(last=False)
        self._planned += 1
