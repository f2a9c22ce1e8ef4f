"""Who may send now: as many at once as `concurrency` allows, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque

from pointsman.daemon.batches.concurrency import Concurrency, Seen
from pointsman.daemon.batches.live import Live


class Allowance:
    def __init__(self, concurrency: Concurrency) -> None:
        self._concurrency = concurrency
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._crowded = 0
        self.in_flight = 0
        self.is_open = True
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def limit(self) -> int:
        return self._concurrency.limit if self.is_open else 0

    async def __aenter__(self) -> None:
        if self.in_flight < self.limit and not self._waiting:
            self._enter()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given in the same moment
                self._leave()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def crowded(self) -> None:
        """An answer has told us to send less."""
        self._crowded += 1

    def tick(self, now: float, live: Live) -> None:
        """Every `concurrency.TICK_S`; `live`: what the others have seen since the last one."""
        seen = Seen(
            self.in_flight,
            self._crowded,
            live.streams,
            live.first_byte_s,
            live.engine_waiting,
            live.is_waiting_new,
        )
        self._crowded = 0
        self._concurrency.tick(seen, now)
        self._admit()

    def close(self) -> None:
        """Nobody else is let in."""
        self.is_open = False

    async def emptied(self) -> None:
        await self._is_empty.wait()

    def _enter(self) -> None:
        self.in_flight += 1
        self._is_empty.clear()

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._is_empty.set()
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.in_flight < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._enter()
                turn.set_result(None)
