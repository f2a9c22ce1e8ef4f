"""Connections to one target: sends requests, reads their answers, says what became of each.

A connection has one request at a time and is kept while the target keeps it, but not used again after MAX_IDLE_S
without one: many servers close at five seconds, and a request that meets the closing is nobody's error.
"""

from __future__ import annotations

import asyncio
import errno
import resource
from collections.abc import Callable
from time import monotonic_ns
from typing import cast

from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.outcome import CONNECT, CUT, DISCONNECT, GENERATOR, TIMEOUT, Verdict, judge
from pointsman.daemon.bench.target import WORKER_HEADERS, Target

MAX_IDLE_S = 2.0
SWEEP_S = 0.05
_OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOMEM, errno.ENOBUFS)
"""Errors of making a connection that say nothing of the target."""

Ended = Callable[["Job", Verdict, Answer, int], None]


class Job:
    """One request on its way; `tag` is its owner's."""

    __slots__ = ("ended", "gaps", "intended_ns", "is_stream", "sent_ns", "tag", "wire")

    def __init__(
        self, wire: bytes, *, is_stream: bool, intended_ns: int, gaps: Histogram, ended: Ended, tag: int = 0
    ) -> None:
        self.wire = wire
        self.is_stream = is_stream
        self.intended_ns = intended_ns
        self.sent_ns = 0
        self.gaps = gaps
        self.ended = ended
        self.tag = tag


class _Connection(asyncio.Protocol):
    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._transport = cast(asyncio.Transport, None)
        self._answer = Answer(WORKER_HEADERS)
        self.job: Job | None = None
        self.idle_since_ns = 0
        self.is_closed = False

    @property
    def events(self) -> int:
        """Of the answer that is read, or was last."""
        return self._answer.events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, job: Job) -> None:
        self.job = job
        self._answer.expect(job.is_stream, job.gaps)
        self._transport.write(job.wire)

    def data_received(self, data: bytes) -> None:
        now_ns = monotonic_ns()
        if self.job is None:  # nobody asked
            self.close()
        elif self._answer.feed(data, now_ns):
            self._end(None, now_ns)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self.job is None:
            return
        if self._answer.end_of_input():
            self._end(None, monotonic_ns())
        else:
            self._end(CUT if self._answer.received else DISCONNECT, monotonic_ns())

    def time_out(self, now_ns: int) -> None:
        self._end(TIMEOUT, now_ns)

    def close(self) -> None:
        self.is_closed = True
        self._transport.abort()

    def _end(self, ended_by: str | None, now_ns: int) -> None:
        job = self.job
        assert job is not None
        self.job = None
        answer = self._answer
        verdict = judge(answer, wants_stream=job.is_stream, ended_by=ended_by)
        if self.is_closed or ended_by is not None or not answer.keeps_alive:
            if not self.is_closed:
                self.close()
            self._driver.forget(self)
        else:
            self.idle_since_ns = now_ns
            self._driver.rest(self)
        job.ended(job, verdict, answer, now_ns)


class Driver:
    def __init__(self, target: Target, timeout_s: float) -> None:
        """On a running loop. `timeout_s`: of a request from the moment that it is sent, connecting included."""
        self.target = target
        self.connects = 0
        """connections made so far"""
        self.in_flight = 0
        self._events_ended = 0
        self._timeout_ns = int(timeout_s * 1e9)
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._busy: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        _raise_file_limit()

    def send(self, job: Job) -> None:
        """`job.ended` is called once, never from within this call."""
        job.sent_ns = monotonic_ns()
        self.in_flight += 1
        while self._idle:
            connection = self._idle.pop()
            if connection.is_closed:
                continue
            if job.sent_ns - connection.idle_since_ns > MAX_IDLE_S * 1e9:
                connection.close()
                continue
            self._busy.add(connection)
            connection.send(job)
            return
        task = self._loop.create_task(self._open(job))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    @property
    def events(self) -> int:
        """Of streams, read so far."""
        return self._events_ended + sum(connection.events for connection in self._busy)

    async def close(self) -> None:
        """What runs is given up, and nobody hears of it."""
        self._sweeper.cancel()
        for task in tuple(self._opening):
            task.cancel()
        for connection in (*self._busy, *self._idle):
            connection.job = None
            connection.close()
        await asyncio.gather(*self._opening, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted close in the loop's next turn

    # --- from connections

    def rest(self, connection: _Connection) -> None:
        self.forget(connection)
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        self.in_flight -= 1
        self._events_ended += connection.events
        self._busy.discard(connection)

    # --- inside

    async def _open(self, job: Job) -> None:
        target = self.target
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self), target.host, target.port, ssl=target.tls
                )
        except TimeoutError:
            self._never_sent(job, Verdict(TIMEOUT, "no connection in time"))
        except OSError as error:
            kind = GENERATOR if error.errno in _OURS else CONNECT
            self._never_sent(job, Verdict(kind, error.strerror or str(error)))
        else:
            self.connects += 1
            if connection.is_closed:  # as soon as it was made
                self._never_sent(job, Verdict(DISCONNECT, "closed as soon as it was connected"))
                return
            self._busy.add(connection)
            connection.send(job)

    def _never_sent(self, job: Job, verdict: Verdict) -> None:
        self.in_flight -= 1
        answer = Answer()
        answer.expect(job.is_stream, job.gaps)
        job.ended(job, verdict, answer, monotonic_ns())

    def _sweep(self) -> None:
        """One timer for all: one for each request would cost more than the rest of it."""
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        now_ns = monotonic_ns()
        limit_ns = now_ns - self._timeout_ns
        late = [one for one in self._busy if one.job is not None and one.job.sent_ns < limit_ns]
        for connection in late:
            connection.time_out(now_ns)


def _raise_file_limit() -> None:
    """As many connections as this user may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
