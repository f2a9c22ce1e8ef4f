"""One connection to the target: it has one request at a time, and says what became of it.

Compiled, because it is called for each event of each stream (connection.pxd gives its classes C structs).
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Protocol, cast

from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.outcome import CUT, DISCONNECT, TIMEOUT, Verdict, judge
from pointsman.daemon.bench.target import WORKER_HEADERS

Ended = Callable[["Job", Verdict, Answer, int], None]


class Owner(Protocol):
    """Whose connection it is."""

    def rest(self, connection: Connection) -> None:
        """It has no request now and may get another one."""
        ...

    def forget(self, connection: Connection) -> None:
        """Its request has ended, and it is closed."""
        ...


class Job:
    """One request on its way; `tag` is its owner's."""

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


class Transport(Protocol):
    """What a connection needs of asyncio's, or of a `PlainSocket`."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...


class Connection:
    """An asyncio.Protocol; the transport asks for nothing but its methods."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: Transport = cast(Transport, None)
        self._answer = Answer(WORKER_HEADERS)
        self.job: Job | None = None
        self.idle_since_ns = 0
        self.is_closed = False

    @property
    def events(self) -> int:
        """Of the answer that is read, or was last."""
        return self._answer.events

    # --- from the owner

    def send(self, job: Job) -> None:
        self.job = job
        self._answer.expect(job.is_stream, job.gaps)
        self._transport.write(job.wire)

    def time_out(self, now_ns: int) -> None:
        self._end(TIMEOUT, now_ns)

    def close(self) -> None:
        self.is_closed = True
        self._transport.abort()

    # --- from the transport

    def connection_made(self, transport: Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now_ns = monotonic_ns()
        if self.job is None:  # nobody asked
            self.close()
        elif self._answer.feed(data, now_ns):
            self._end(None, now_ns)

    def eof_received(self) -> None:
        return None  # the transport closes; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self.job is None:
            return
        if self._answer.end_of_input():
            self._end(None, monotonic_ns())
        else:
            self._end(CUT if self._answer.received else DISCONNECT, monotonic_ns())

    def pause_writing(self) -> None:
        pass  # one request is all that waits

    def resume_writing(self) -> None:
        pass

    # --- inside

    def _end(self, ended_by: str | None, now_ns: int) -> None:
        job = self.job
        assert job is not None
        self.job = None
        answer = self._answer
        verdict = judge(answer, wants_stream=job.is_stream, ended_by=ended_by)
        if self.is_closed or ended_by is not None or not answer.keeps_alive:
            if not self.is_closed:
                self.close()
            self._owner.forget(self)
        else:
            self.idle_since_ns = now_ns
            self._owner.rest(self)
        job.ended(job, verdict, answer, now_ns)
