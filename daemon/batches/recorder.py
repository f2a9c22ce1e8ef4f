"""Makes results durable: first in the store, then marked in the ledger, many at a time.

Whoever records waits until both have happened. While the disk is full or the store away, everybody waits, nothing is
lost, and since a waiting line keeps its place among the open ones, no new one is begun.
"""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from pointsman.daemon.batches.payloads import Payloads, StoreFull, StoreTrouble
from pointsman.daemon.batches.rows import DoneLine
from pointsman.daemon.batches.shelf import Shelf
from pointsman.daemon.stores.results import Invalid, NoSpace
from pointsman.daemon.telemetry.logs import log

MAX_TOGETHER = 256
PATIENCE_S = 5.0
"""for one try, with the retries of the store's engine; then it shows that nothing goes on"""
PAUSE_S = 1.0
"""between tries"""


def result_key(batch_id: str, number: int) -> str:
    return f"pointsman/{batch_id}/{number}"


class Result(msgspec.Struct, frozen=True):
    batch: int
    """serial"""
    batch_id: str
    number: int
    has_succeeded: bool
    line: bytes
    """of the output or error file"""

    @property
    def key(self) -> str:
        return result_key(self.batch_id, self.number)


class _Waiting:
    __slots__ = ("is_durable", "result")

    def __init__(self, result: Result) -> None:
        self.result = result
        self.is_durable: asyncio.Future[bool] = asyncio.get_running_loop().create_future()


class Recorder:
    def __init__(self, shelf: Shelf, payloads: Payloads) -> None:
        self._shelf = shelf
        self._payloads = payloads
        self._waiting: deque[_Waiting] = deque()
        self._news = asyncio.Event()
        self._is_drained = asyncio.Event()
        self._is_drained.set()
        self.paused = ""
        """why nothing can be recorded now; empty = it can"""

    async def drained(self) -> None:
        """Until nothing waits to be recorded."""
        await self._is_drained.wait()

    async def record(self, result: Result) -> bool:
        """Returns when it survives a crash; False: the store will never take it (it is too large)."""
        waiting = _Waiting(result)
        self._waiting.append(waiting)
        self._is_drained.clear()
        self._news.set()
        return await waiting.is_durable

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                some = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_TOGETHER))]
                await self._make_durable(some)
            self._is_drained.set()

    async def _make_durable(self, some: list[_Waiting]) -> None:
        left = some
        while left:
            failed = await self._payloads.put_some({one.result.key: one.result.line for one in left}, PATIENCE_S)
            stored = [one for one in left if one.result.key not in failed]
            await self._mark(stored)
            again = []
            for one in left:
                failure = failed.get(one.result.key)
                if isinstance(failure, Invalid):
                    _settle(one, is_durable=False)
                elif failure is not None:
                    again.append(one)
            left = again
            if left:
                is_full = any(isinstance(failure, NoSpace) for failure in failed.values())
                await self._pause(StoreFull.reason if is_full else StoreTrouble.reason)
        self._resume()

    async def _mark(self, stored: list[_Waiting]) -> None:
        lines = [DoneLine(one.result.batch, one.result.number, one.result.has_succeeded) for one in stored]
        while lines:
            try:
                await self._shelf.do(self._shelf.ledger.mark_done, lines)
                break
            except StoreTrouble as error:
                await self._pause(error.reason)
        for one in stored:
            _settle(one, is_durable=True)

    async def _pause(self, reason: str) -> None:
        if self.paused != reason:
            log("batches_paused", level="warning", reason=reason)
            self.paused = reason
        await asyncio.sleep(PAUSE_S)

    def _resume(self) -> None:
        if self.paused:
            log("batches_resumed", after=self.paused)
            self.paused = ""


def _settle(one: _Waiting, *, is_durable: bool) -> None:
    if not one.is_durable.done():  # its line may have been cancelled meanwhile; the result is kept all the same
        one.is_durable.set_result(is_durable)
