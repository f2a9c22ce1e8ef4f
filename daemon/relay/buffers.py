"""The bound on request bodies held in memory, over all shards together.

Every shard keeps its own gauge in shared memory; the sum may overshoot by what is already on the way (one read per
connection), never by more. Over the bound, connections that are still sending stop being read, in order of arrival;
whoever waits longer than `buffer_wait_s` is answered 503.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from pointsman.daemon.shm.layout import G_BUFFERED_BYTES, GAUGE_WORDS
from pointsman.daemon.shm.segment import Segment

RETRY_S = 0.02
_STRIDE = GAUGE_WORDS


class Waiter(Protocol):
    def resume_body(self) -> None: ...

    def give_up_body(self) -> None: ...


class BodyBuffers:
    def __init__(
        self,
        segment: Segment,
        shard: int,
        limit_bytes: int,
        wait_s: float,
        call_later: Callable[[float, Callable[[], None]], object],
        now: Callable[[], float],
    ) -> None:
        self._words = segment.words
        self._first = segment.layout.gauge(0, G_BUFFERED_BYTES)
        self._shards = segment.layout.shards
        self._cell = segment.layout.gauge(shard, G_BUFFERED_BYTES)
        self._limit = limit_bytes
        self._wait_s = wait_s
        self._call_later = call_later
        self._now = now
        self._waiting: deque[tuple[float, Waiter]] = deque()
        self._is_polling = False

    def is_full(self) -> bool:
        return self._words.column(self._first, _STRIDE, self._shards) > self._limit

    def may_keep(self) -> bool:
        """Whether a body may stay while its answer runs: half of the room is for those that are still being read."""
        return 2 * self._words.column(self._first, _STRIDE, self._shards) <= self._limit

    def take(self, size: int) -> None:
        self._words.add(self._cell, size)

    def give(self, size: int) -> None:
        self._words.add(self._cell, -size)

    def wait(self, waiter: Waiter) -> None:
        """`waiter.resume_body` is called when there is room, `give_up_body` when there was none for too long."""
        self._waiting.append((self._now() + self._wait_s, waiter))
        if not self._is_polling:
            self._is_polling = True
            self._call_later(RETRY_S, self._poll)

    def _poll(self) -> None:
        now = self._now()
        while self._waiting and not self.is_full():
            self._waiting.popleft()[1].resume_body()
        while self._waiting and self._waiting[0][0] <= now:
            self._waiting.popleft()[1].give_up_body()
        self._is_polling = bool(self._waiting)
        if self._is_polling:
            self._call_later(RETRY_S, self._poll)
