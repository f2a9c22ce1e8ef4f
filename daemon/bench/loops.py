"""When requests are sent: by clients in turn (closed), or at times that do not ask for answers (open)."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Protocol

from pointsman.daemon.bench.alarm import Alarm
from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.arrivals import Follower, Timed
from pointsman.daemon.bench.connection import Job
from pointsman.daemon.bench.dialects import Ask
from pointsman.daemon.bench.driver import Driver
from pointsman.daemon.bench.outcome import CONNECT, GENERATOR, Verdict
from pointsman.daemon.bench.tally import Recorder

CONNECT_PAUSE_S = 0.1
"""Of a client that got no connection: a target that refuses would else be asked as fast as this machine can."""
_BATCH = 64
"""Late arrivals that are sent before answers are read again."""


@dataclass(slots=True, frozen=True)
class Extent:
    """How much is measured: so many requests, or the requests of so many seconds; behind a warm-up of `warm_up_s`."""

    warm_up_s: float
    requests: int | None = None
    seconds: float | None = None


class Loop(Protocol):
    recorder: Recorder

    async def run(self) -> None:
        """Until the last answer."""
        ...

    def stop(self) -> None:
        """No further request begins."""
        ...


Encode = Callable[[Ask], bytes]


class ClosedLoop:
    """`clients` that ask again as soon as they were answered. The intended start is when a client is free."""

    def __init__(
        self,
        driver: Driver,
        clients: int,
        asks: Callable[[int], Ask],
        encode: Encode,
        extent: Extent,
        slice_ns: int,
    ) -> None:
        now_ns = monotonic_ns()
        self.recorder = Recorder(now_ns + int(extent.warm_up_s * 1e9), slice_ns)
        self._driver = driver
        self._clients = clients
        self._asks = asks
        self._encode = encode
        self._limit = extent.requests
        self._end_ns = None if extent.seconds is None else self.recorder.measure_from_ns + int(extent.seconds * 1e9)
        self._asked = 0
        self._measured = 0
        self._running = 0
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        self._is_stopping = False

    async def run(self) -> None:
        for _ in range(self._clients):
            self._next()
        await self._done

    def stop(self) -> None:
        self._is_stopping = True

    def _next(self) -> None:
        now_ns = monotonic_ns()
        is_measured = now_ns >= self.recorder.measure_from_ns
        if self._is_over(now_ns):
            self.recorder.close_window(now_ns)
            if self._running == 0 and not self._done.done():
                self._done.set_result(None)
            return
        if is_measured:
            self._measured += 1
        ask = self._asks(self._asked)
        self._asked += 1
        self._running += 1
        tally = self.recorder.tally_of(now_ns)
        job = Job(self._encode(ask), is_stream=ask.is_stream, intended_ns=now_ns, gaps=tally.gaps, ended=self._ended)
        self._driver.send(job)
        tally.lag.record(job.sent_ns - now_ns)

    def _is_over(self, now_ns: int) -> bool:
        is_enough = self._limit is not None and self._measured >= self._limit
        return self._is_stopping or is_enough or (self._end_ns is not None and now_ns >= self._end_ns)

    def _ended(self, job: Job, verdict: Verdict, answer: Answer, end_ns: int) -> None:
        self._running -= 1
        self.recorder.add(verdict, answer, job.intended_ns, end_ns)
        if verdict.kind in (CONNECT, GENERATOR):
            self._running += 1  # the pause belongs to it: the load is not over
            self._loop.call_later(CONNECT_PAUSE_S, self._after_pause)
        else:
            self._next()

    def _after_pause(self) -> None:
        self._running -= 1
        self._next()


class OpenLoop:
    """Requests at their times, however long answers take. All are counted from when they were due.

    `followers` tells what is due after the end of the request of a number.
    """

    def __init__(
        self,
        driver: Driver,
        timed: Timed,
        encode: Encode,
        extent: Extent,
        slice_ns: int,
        followers: Callable[[int], list[Follower]] | None = None,
    ) -> None:
        self._begin_ns = monotonic_ns()
        self.recorder = Recorder(self._begin_ns + int(extent.warm_up_s * 1e9), slice_ns)
        self._driver = driver
        self._timed = timed
        self._encode = encode
        self._followers = followers
        self._limit = extent.requests
        self._end_ns = None if extent.seconds is None else self.recorder.measure_from_ns + int(extent.seconds * 1e9)
        self._due: list[tuple[int, int, Ask, bytes]] = []
        """(when, number, request, its bytes): the next of `timed`, and followers"""
        self._awaited = -1
        """number of the one of `timed` that is in `_due`"""
        self._measured = 0
        self._running = 0
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        self._alarm = Alarm(self._loop, self._send_due)
        self._is_stopping = False

    async def run(self) -> None:
        try:
            self._draw()
            self._arm()
            await self._done
        finally:
            self._alarm.close()

    def stop(self) -> None:
        self._is_stopping = True
        self._due.clear()
        self._arm()

    def _draw(self) -> None:
        """The next of `timed` into `_due`, already in bytes, so that it is not late by that."""
        entry = next(self._timed, None)
        if entry is not None:
            offset_s, self._awaited, ask = entry
            self._push(self._begin_ns + int(offset_s * 1e9), self._awaited, ask)

    def _push(self, when_ns: int, number: int, ask: Ask) -> None:
        heapq.heappush(self._due, (when_ns, number, ask, self._encode(ask)))

    def _arm(self) -> None:
        if self._due:
            self._alarm.set(self._due[0][0])
            return
        if self._followers is None or self._is_stopping or self._running == 0:
            self.recorder.close_window(monotonic_ns())
        if self._running == 0 and not self._done.done():
            self._done.set_result(None)

    def _send_due(self) -> None:
        for _ in range(_BATCH):
            if not self._due or self._due[0][0] > monotonic_ns():
                break
            when_ns, number, ask, wire = heapq.heappop(self._due)
            if self._is_over(when_ns):
                self._due.clear()
                self._is_stopping = True
                break
            self._send(when_ns, number, ask, wire)
            if number == self._awaited:
                self._draw()
        self._arm()

    def _send(self, when_ns: int, number: int, ask: Ask, wire: bytes) -> None:
        tally = self.recorder.tally_of(when_ns)
        if when_ns >= self.recorder.measure_from_ns:
            self._measured += 1
        self._running += 1
        job = Job(wire, is_stream=ask.is_stream, intended_ns=when_ns, gaps=tally.gaps, ended=self._ended, tag=number)
        self._driver.send(job)
        tally.lag.record(job.sent_ns - when_ns)

    def _is_over(self, when_ns: int) -> bool:
        is_enough = self._limit is not None and self._measured >= self._limit
        return self._is_stopping or is_enough or (self._end_ns is not None and when_ns >= self._end_ns)

    def _ended(self, job: Job, verdict: Verdict, answer: Answer, end_ns: int) -> None:
        self._running -= 1
        self.recorder.add(verdict, answer, job.intended_ns, end_ns)
        if self._followers is not None and not self._is_stopping:
            for follower in self._followers(job.tag):
                self._push(end_ns + int(follower.delay_s * 1e9), follower.number, follower.ask)
            self._arm()
        elif self._running == 0:
            self._arm()
