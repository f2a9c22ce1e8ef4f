"""When a worker counts as up, and when it is asked next. Pure: a state machine with `now` as argument.

              success                     failure_threshold failures in a row, or one refused connection
    pending ───────────> up ──────────────────────────────────────────────────────────> down
                          ^            success_threshold successes in a row              │
                          └──────────────────────────────────────────────────────────────┘

A shard that meets a refused connection takes the worker out itself (the status word in shared memory goes from up to
down); `seen_down` brings this machine in step. No state is final: whatever is down is asked again every
`down_interval_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pointsman.daemon.shm.layout import STATUS_DOWN, STATUS_PENDING, STATUS_UP

SEEN_BY_SHARD = "connection refused (seen by a shard)"


class Rng(Protocol):
    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, and numbers of probes in a row."""

    up_interval_s: float
    down_interval_s: float
    failure_threshold: int
    success_threshold: int


@dataclass(slots=True)
class Health:
    """Times are of one monotonic clock."""

    pace: Pace
    status: int = STATUS_PENDING
    next_probe: float = 0.0
    last_probe: float | None = None
    last_error: str | None = None
    failures: int = 0
    successes: int = 0
    _down_at: float = 0.0

    def succeeded(self, started: float, now: float, rng: Rng) -> None:
        self._probed(started)
        if self.status == STATUS_DOWN and started < self._down_at:
            self._plan(started, now, rng)  # asked before it went down: says nothing about now
            return
        self.failures = 0
        self.successes += 1
        if self.status == STATUS_PENDING or self.successes >= self.pace.success_threshold:
            self.status = STATUS_UP
            self.last_error = None
        self._plan(started, now, rng)

    def failed(self, error: str, started: float, now: float, rng: Rng, *, is_refused: bool = False) -> None:
        """`is_refused`: nobody listens there, or the connection was reset; no further proof is needed."""
        self._probed(started)
        self.last_error = error
        self.successes = 0
        self.failures += 1
        if self.status == STATUS_UP and (is_refused or self.failures >= self.pace.failure_threshold):
            self._go_down(now)
        self._plan(started, now, rng)

    def seen_down(self, now: float) -> None:
        """A shard has taken the worker out."""
        if self.status == STATUS_UP:
            self._go_down(now)
            self.last_error = SEEN_BY_SHARD
            self.next_probe = min(self.next_probe, now + self.pace.down_interval_s)

    def follow(self, pace: Pace, now: float) -> None:
        """Other settings: a probe that they would have planned earlier comes earlier."""
        self.pace = pace
        interval = pace.up_interval_s if self.status == STATUS_UP else pace.down_interval_s
        self.next_probe = min(self.next_probe, now + interval)

    def _go_down(self, now: float) -> None:
        self.status = STATUS_DOWN
        self._down_at = now
        self.successes = 0

    def _probed(self, started: float) -> None:
        self.last_probe = started

    def _plan(self, started: float, now: float, rng: Rng) -> None:
        """A little early, never late: probes of many workers drift apart, and an interval keeps its word."""
        interval = self.pace.up_interval_s if self.status == STATUS_UP else self.pace.down_interval_s
        self.next_probe = max(now, started + interval * (0.9 + 0.1 * rng.random()))
