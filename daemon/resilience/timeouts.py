"""The deadlines of one request: which of them runs, when it ends, and how a request ends that misses it.

Theory of operation. A request goes through phases; each has one deadline of its own, and `total` runs through all:

    phase                                    deadline       from
    body of the request is read              client_body    the last read
    a connection to a worker is made         connect        the attempt (kept where the connection is made)
    sent; streams only: nothing came yet     first_token    the sending; per attempt
    answer under way                         idle           the last progress
    answer under way, client does not read   client_read    the moment at which its buffers were full

* The first token of an answer that is no stream comes when all of it is generated, so `first_token` is for streams.
* A client that does not read makes us stop reading from the worker: the worker is not idle then.
* Nobody pays for this per chunk. `Watch` compares how far the answer has come whenever it is asked, which is each
  quarter of `idle_s`: a stream that stands still is noticed after one to one and a quarter of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pointsman.config.resilience import TimeoutsSection
from pointsman.daemon.errors import Fault

LOOKS = 4
"""in `idle_s`"""
_NEVER, _LOOKS = math.inf, LOOKS


class Deadline(StrEnum):
    """Values are the labels of the metric. Of two that expire together the earlier of this list counts."""

    CLIENT_BODY = "client_body"
    CLIENT_READ = "client_read"
    CONNECT = "connect"
    FIRST_TOKEN = "first_token"
    IDLE = "idle"
    TOTAL = "total"


DEADLINES = tuple(Deadline)


@dataclass(frozen=True, slots=True)
class Missed:
    """How a request ends that missed a deadline."""

    status: int
    """To answer with, if nothing of the answer has gone out; 499 is in logs and metrics only."""
    code: str
    fault: Fault


MISSED: dict[Deadline, Missed] = {
    Deadline.CLIENT_BODY: Missed(408, "request_timeout", Fault.CLIENT),
    Deadline.CLIENT_READ: Missed(499, "client_not_reading", Fault.CLIENT),
    Deadline.CONNECT: Missed(504, "worker_connect_timeout", Fault.WORKER),
    Deadline.FIRST_TOKEN: Missed(504, "worker_first_token_timeout", Fault.WORKER),
    Deadline.IDLE: Missed(504, "worker_idle_timeout", Fault.WORKER),
    Deadline.TOTAL: Missed(504, "request_total_timeout", Fault.GATEWAY),
}


def _or_never(seconds: float) -> float:
    """0 in the configuration: no such deadline."""
    return seconds or _NEVER


class Watch:
    """Of one request under one profile. Times are seconds of the monotonic clock."""

    def __init__(self, section: TimeoutsSection, started: float, is_stream: bool) -> None:
        self.section = section
        self.started = started
        self.is_stream = is_stream
        self.has_answer = False
        """bytes of an answer have gone to the client"""
        self._sent_at = _NEVER
        self._stalled_at = _NEVER
        self._progress = -1
        self._seen_at = 0.0
        self._pinged_at = 0.0
        self._paused_s = 0.0

    @property
    def ends_at(self) -> float:
        """The end of everything."""
        return self.started + (self.section.total_s or _NEVER)

    def first_look(self) -> float:
        """When to ask for the first time."""
        section = self.section
        first = min(_or_never(section.total_s), _or_never(section.idle_s) / _LOOKS)
        if self.is_stream:
            first = min(first, _or_never(section.first_token_s), _or_never(section.ping_s))
        return self.started + first

    def sent(self, now: float, paused_s: float = 0.0) -> None:
        """An attempt has gone out. `paused_s`: how long the daemon has been paused in all."""
        self._sent_at = now
        self._paused_s = paused_s

    def failed(self) -> None:
        """It came to nothing, or broke; perhaps another one follows."""
        self.has_answer = False
        self._sent_at = _NEVER

    def is_ping_due(self, now: float) -> bool:
        """Whether the client of a stream that has not begun is to be told that it still waits; asked for once."""
        ping_s = self.section.ping_s
        if not (ping_s and self.is_stream) or self.has_answer or self._sent_at == _NEVER:
            return False
        if now < max(self._pinged_at, self.started) + ping_s:
            return False
        self._pinged_at = now
        return True

    def stalled(self, now: float) -> float:
        """The client reads nothing; returns when to look."""
        self._stalled_at = now
        return now + (self.section.client_read_s or _NEVER)

    def reads_again(self, now: float) -> None:
        self._stalled_at = _NEVER
        self._seen_at = now

    def look(self, now: float, progress: int, paused_s: float = 0.0) -> tuple[Deadline | None, float]:
        """(what was missed, when to ask again). `progress`: any number that grows with the answer.

        While the daemon is paused its engines may stand still: only the total goes on.
        """
        if paused_s != self._paused_s:
            longer, self._paused_s = paused_s - self._paused_s, paused_s
            self._sent_at += longer
            self._stalled_at += longer
            self._seen_at += longer
        if progress != self._progress:
            self._progress, self._seen_at = progress, now
        deadline, at = self._next()
        if self.ends_at <= at:
            deadline, at = Deadline.TOTAL, self.ends_at
        if now >= at:
            return deadline, _NEVER
        # An answer may begin at any moment, and from then on it may stand still.
        interval = self.section.idle_s / LOOKS or _NEVER
        if self.is_stream and not self.has_answer:
            interval = min(interval, self.section.ping_s or _NEVER)
        return None, min(at, now + interval)

    def _next(self) -> tuple[Deadline, float]:
        section = self.section
        if not self.has_answer:
            is_due = self.is_stream and section.first_token_s
            return Deadline.FIRST_TOKEN, self._sent_at + section.first_token_s if is_due else _NEVER
        if self._stalled_at != _NEVER:
            return Deadline.CLIENT_READ, self._stalled_at + (section.client_read_s or _NEVER)
        return Deadline.IDLE, self._seen_at + (section.idle_s or _NEVER)
