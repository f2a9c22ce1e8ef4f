"""The deadlines of one request: which runs when, which is next, and how a request ends that misses one.

Theory of operation. Events disarm deadlines and arm others (`_TABLE`); a deadline that is off (0 s) is never armed.
Local to the request, in no shared memory. The caller sets one timer for `next_at` and asks `expired` when it fires;
it need not move the timer with every chunk, only look again when it fires too early.

    event            disarms                          arms
    ARRIVED          -                                total; client_body if a body follows
    BODY_READ        -                                client_body
    BODY_COMPLETE    client_body                      -
    CONNECTING       first_token, idle                connect
    SENT             connect                          first_token (streams only)
    ANSWER_READ      first_token                      idle
    CLIENT_STALLED   idle                             client_read
    CLIENT_READS     client_read                      idle
    FAILED           connect, first_token, idle       -           an attempt: perhaps another one follows
    ENDED            all                              -

* The first token of an answer that is no stream comes when all of it is generated, so `first_token` runs for
  streams only.
* A client that does not read makes us stop reading from the worker: the worker is not idle then.
* The client's head is read before there is a profile: its deadline is the daemon's (`header_timeout_s`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, StrEnum

from pointsman.config.resilience import TimeoutsSection
from pointsman.daemon.errors import Fault


class Deadline(StrEnum):
    """Values are the labels of the metric. Of two that expire together the earlier of this list counts."""

    CLIENT_BODY = "client_body"
    CLIENT_READ = "client_read"
    CONNECT = "connect"
    FIRST_TOKEN = "first_token"
    IDLE = "idle"
    TOTAL = "total"


class Event(Enum):
    ARRIVED = "arrived"
    BODY_READ = "body_read"
    BODY_COMPLETE = "body_complete"
    CONNECTING = "connecting"
    SENT = "sent"
    ANSWER_READ = "answer_read"
    CLIENT_STALLED = "client_stalled"
    CLIENT_READS = "client_reads"
    FAILED = "failed"
    ENDED = "ended"


_ATTEMPT = (Deadline.CONNECT, Deadline.FIRST_TOKEN, Deadline.IDLE)

_TABLE: dict[Event, tuple[tuple[Deadline, ...], tuple[Deadline, ...]]] = {
    Event.ARRIVED: ((), (Deadline.TOTAL, Deadline.CLIENT_BODY)),
    Event.BODY_READ: ((), (Deadline.CLIENT_BODY,)),
    Event.BODY_COMPLETE: ((Deadline.CLIENT_BODY,), ()),
    Event.CONNECTING: ((Deadline.FIRST_TOKEN, Deadline.IDLE), (Deadline.CONNECT,)),
    Event.SENT: ((Deadline.CONNECT,), (Deadline.FIRST_TOKEN,)),
    Event.ANSWER_READ: ((Deadline.FIRST_TOKEN,), (Deadline.IDLE,)),
    Event.CLIENT_STALLED: ((Deadline.IDLE,), (Deadline.CLIENT_READ,)),
    Event.CLIENT_READS: ((Deadline.CLIENT_READ,), (Deadline.IDLE,)),
    Event.FAILED: (_ATTEMPT, ()),
    Event.ENDED: (tuple(Deadline), ()),
}


@dataclass(frozen=True, slots=True)
class Expiry:
    """How a request ends that missed a deadline."""

    deadline: Deadline
    """Also the label of the metric."""
    at: float
    status: int
    """To answer with, if nothing of the answer has gone out; 499 is in logs and metrics only."""
    code: str
    fault: Fault

    @property
    def is_workers_failure(self) -> bool:
        """Whether the worker's breaker counts it."""
        return self.fault is Fault.WORKER


_ENDINGS: dict[Deadline, tuple[int, str, Fault]] = {
    Deadline.CLIENT_BODY: (408, "request_timeout", Fault.CLIENT),
    Deadline.CLIENT_READ: (499, "client_not_reading", Fault.CLIENT),
    Deadline.CONNECT: (504, "worker_connect_timeout", Fault.WORKER),
    Deadline.FIRST_TOKEN: (504, "worker_first_token_timeout", Fault.WORKER),
    Deadline.IDLE: (504, "worker_idle_timeout", Fault.WORKER),
    Deadline.TOTAL: (504, "request_total_timeout", Fault.GATEWAY),
}


class Deadlines:
    """Of one request under one profile. Times are seconds of the monotonic clock."""

    __slots__ = ("_armed", "_has_answer", "_has_body", "_is_sent", "_is_stream", "_section")

    def __init__(self, section: TimeoutsSection, *, is_stream: bool = False, has_body: bool = True) -> None:
        self._section = section
        self._is_stream = is_stream
        self._has_body = has_body
        self._is_sent = False
        self._has_answer = False
        self._armed: dict[Deadline, float] = {}

    def on(self, event: Event, now: float) -> None:
        self._note(event)
        disarmed, armed = _TABLE[event]
        for deadline in disarmed:
            self._armed.pop(deadline, None)
        for deadline in armed:
            seconds = self._seconds(deadline)
            if seconds:
                self._armed[deadline] = now + seconds

    def told(self, *, is_stream: bool) -> None:
        """What the body says, once it is read; before SENT."""
        self._is_stream = is_stream

    @property
    def next_at(self) -> float:
        """When to look again; infinite when nothing runs."""
        return min(self._armed.values(), default=math.inf)

    def armed(self) -> dict[Deadline, float]:
        return dict(self._armed)

    def expired(self, now: float) -> Expiry | None:
        """The deadline that passed first, None when none did."""
        missed = [(at, deadline) for deadline in Deadline if (at := self._armed.get(deadline, math.inf)) <= now]
        if not missed:
            return None
        at, deadline = min(missed, key=lambda pair: pair[0])
        status, code, fault = _ENDINGS[deadline]
        if deadline is Deadline.TOTAL and self._is_sent and not self._has_answer:
            fault = Fault.WORKER  # it had the request and never said a word
        return Expiry(deadline, at, status, code, fault)

    def _note(self, event: Event) -> None:
        if event is Event.SENT:
            self._is_sent, self._has_answer = True, False
        elif event is Event.ANSWER_READ:
            self._has_answer = True
        elif event is Event.FAILED:
            self._is_sent = False

    def _seconds(self, deadline: Deadline) -> float:
        section = self._section
        match deadline:
            case Deadline.CLIENT_BODY:
                return section.client_body_s if self._has_body else 0.0
            case Deadline.CLIENT_READ:
                return section.client_read_s
            case Deadline.CONNECT:
                return section.connect_s
            case Deadline.FIRST_TOKEN:
                return section.first_token_s if self._is_stream else 0.0
            case Deadline.IDLE:
                return section.idle_s
            case Deadline.TOTAL:
                return section.total_s
