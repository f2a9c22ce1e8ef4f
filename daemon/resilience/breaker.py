"""The breaker of one worker, shared by all shards.

Theory of operation.

            failure_threshold failures in a row, or
            failure_rate of at least min_requests within window_s
    CLOSED ────────────────────────────────────────────────────────> OPEN <──────────────┐
       ^                                                              │ timeout_s, and   │ a probe fails
       │            success_threshold probes in a row succeed         v a request comes  │
       └───────────────────────────────────────────────────────── HALF_OPEN ─────────────┘

A request needs a *ticket* (`acquire`) before it is sent, and brings it back with what came of it (`record`). While the
breaker is closed everybody gets the same ticket. When half-open there is one ticket at a time, the probe's; nobody
else passes. It comes back with its result, or when its shard is reaped (`release_shard`), or after `probe_lease_s`.

A ticket is the value of the word SERIAL, which grows whenever older tickets must not count any more: at every
change of state and whenever a probe goes out or comes back. So at most one ticket is good for anything when
half-open, a result is taken once, and an answer that began before the breaker opened decides nothing after it
closed again.

Results (rows: state, columns: verdict; only of tickets that are still good):

                  SUCCESS                     FAILURE                      NEUTRAL
    CLOSED        run of failures ends        run grows → perhaps OPEN     -
    OPEN          (no ticket is good)
    HALF_OPEN     counts → perhaps CLOSED     OPEN                         the permit is free again

The window is a ring of BUCKETS, each with the time at which it begins; a bucket that began `window_s` ago or
earlier does not count, so the window reaches back between (BUCKETS - 1) / BUCKETS of `window_s` and all of it. A
change of `window_s` needs no repair. While open it also counts what is sent all the same (`ejection`), to know who
is the least bad.

Every change of state stores STATE last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from pointsman.config.resilience import BreakerSection
from pointsman.daemon.resilience.words import Words

BUCKETS = 8
BUCKET_WORDS = 3

WORDS = 32
B_STATE, B_SERIAL, B_FAILURES, B_SUCCESSES, B_HOLDER = range(5)
B_SINCE, B_LEASE_END = 5, 6  # doubles: seconds
B_OPENINGS = 7  # only grows
B_WINDOW = 8
BUCKET_START, BUCKET_REQUESTS, BUCKET_FAILURES = range(BUCKET_WORDS)  # the first is a double

UNCOUNTED = -1
"""Ticket of a request that is sent though the breaker does not let it pass, or that has no breaker."""

_LONG_S = 1e9
"""longer than any timeout"""

PROBE_RETRY_AFTER_S = 1.0
"""What a client is told while a probe is out: its result may come at any moment."""


class State(IntEnum):
    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Verdict(Enum):
    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


def verdict_of(status: int) -> Verdict:
    """Of an answer. Timeouts and broken connections are failures; a client that left is neutral."""
    if status >= 500:
        return Verdict.FAILURE
    return Verdict.NEUTRAL if status >= 400 else Verdict.SUCCESS


@dataclass(frozen=True, slots=True)
class BreakerView:
    """For people, metrics and `ejection`. `since`: seconds of the monotonic clock, 0 = it never changed."""

    state: State
    since: float
    failures_in_a_row: int
    requests: int
    """In the window, as `failures`."""
    failures: int
    openings: int
    is_probed: bool

    @property
    def failure_share(self) -> float:
        return self.failures / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class Breaker:
    section: BreakerSection

    # --- before a request

    def permits(self, words: Words, now: float) -> bool:
        """Whether `acquire` would give a ticket. Changes nothing: for choosing among candidates."""
        state = words.get_int(B_STATE)
        return state == State.CLOSED or not self.section.enabled or self._may_probe(words, now, state)

    def acquire(self, words: Words, now: float, shard: int) -> int | None:
        """The ticket of a request about to be sent; None: it may not be sent."""
        if not self.section.enabled:
            return UNCOUNTED
        state = words.get_int(B_STATE)
        if state == State.CLOSED:
            return words.get_int(B_SERIAL)
        return self._send_probe(words, now, shard, state) if self._may_probe(words, now, state) else None

    def retry_after_s(self, words: Words, now: float) -> float:
        """How long until a request may pass; 0 = now."""
        if self.permits(words, now):
            return 0.0
        if words.get_int(B_STATE) == State.OPEN:
            timeout_s = self.section.timeout_s
            return min(words.get_real(B_SINCE) + timeout_s - now, timeout_s)
        return PROBE_RETRY_AFTER_S

    def _may_probe(self, words: Words, now: float, state: int) -> bool:
        if state == State.OPEN:
            return now >= words.get_real(B_SINCE) + self.section.timeout_s
        return not words.get_int(B_HOLDER) or now >= words.get_real(B_LEASE_END)

    def _send_probe(self, words: Words, now: float, shard: int, state: int) -> int:
        # A permit that nobody got because its giver died here is one that the reaper or the lease takes back.
        words.set_real(B_LEASE_END, now + self.section.probe_lease_s)
        ticket = _void_tickets(words)
        words.set_int(B_HOLDER, shard + 1)
        if state == State.OPEN:
            words.set_int(B_SUCCESSES, 0)
            words.set_real(B_SINCE, now)
            words.set_int(B_STATE, State.HALF_OPEN)
        return ticket

    # --- after it

    def record(self, words: Words, now: float, ticket: int, verdict: Verdict) -> None:
        """Once for every ticket: ordinary requests at their end, probes best at the first byte of the answer.

        A stream that breaks after that may be recorded once more as a failure; a probe's second word is not heard.
        """
        if not self.section.enabled:
            return
        state = words.get_int(B_STATE)
        is_good = ticket == words.get_int(B_SERIAL)
        if verdict is not Verdict.NEUTRAL and (is_good or state != State.CLOSED):
            self._count(words, now, verdict)
        if is_good and (react := _REACTIONS.get((state, verdict))):
            react(self, words, now)

    def release_shard(self, words: Words, shard: int) -> None:
        """Take back the permit of a shard that is dead; to be called for every worker's row."""
        if words.get_int(B_HOLDER) == shard + 1:
            self._free_permit(words)

    def _succeeded(self, words: Words, now: float) -> None:
        words.set_int(B_FAILURES, 0)

    def _failed(self, words: Words, now: float) -> None:
        failures = words.get_int(B_FAILURES) + 1
        words.set_int(B_FAILURES, failures)
        if failures >= self.section.failure_threshold or self._is_rate_exceeded(words, now):
            self._open(words, now)

    def _probe_succeeded(self, words: Words, now: float) -> None:
        successes = words.get_int(B_SUCCESSES) + 1
        if successes >= self.section.success_threshold:
            self._close(words, now)
            return
        words.set_int(B_SUCCESSES, successes)
        self._free_permit(words)

    def _probe_failed(self, words: Words, now: float) -> None:
        self._open(words, now)

    def _probe_told_nothing(self, words: Words, now: float) -> None:
        self._free_permit(words)

    def _free_permit(self, words: Words) -> None:
        _void_tickets(words)
        words.set_int(B_HOLDER, 0)

    def _open(self, words: Words, now: float) -> None:
        words.set_real(B_SINCE, now)
        words.set_int(B_OPENINGS, words.get_int(B_OPENINGS) + 1)
        self._free_permit(words)
        words.set_int(B_STATE, State.OPEN)

    def _close(self, words: Words, now: float) -> None:
        for index in range(B_WINDOW, B_WINDOW + BUCKETS * BUCKET_WORDS):
            words.set_int(index, 0)
        words.set_int(B_FAILURES, 0)
        words.set_real(B_SINCE, now)
        self._free_permit(words)
        words.set_int(B_STATE, State.CLOSED)

    # --- the window

    def _count(self, words: Words, now: float, verdict: Verdict) -> None:
        width = self.section.window_s / BUCKETS
        turn = int(now / width)
        bucket = B_WINDOW + turn % BUCKETS * BUCKET_WORDS
        start = turn * width
        if words.get_real(bucket + BUCKET_START) != start:
            # Emptied before it is renamed: old counts never appear under a new time.
            words.set_int(bucket + BUCKET_REQUESTS, 0)
            words.set_int(bucket + BUCKET_FAILURES, 0)
            words.set_real(bucket + BUCKET_START, start)
        words.set_int(bucket + BUCKET_REQUESTS, words.get_int(bucket + BUCKET_REQUESTS) + 1)
        if verdict is Verdict.FAILURE:
            words.set_int(bucket + BUCKET_FAILURES, words.get_int(bucket + BUCKET_FAILURES) + 1)

    def _in_window(self, words: Words, now: float) -> tuple[int, int]:
        """(requests, failures)"""
        oldest = now - self.section.window_s
        requests = failures = 0
        for bucket in range(B_WINDOW, B_WINDOW + BUCKETS * BUCKET_WORDS, BUCKET_WORDS):
            if words.get_real(bucket + BUCKET_START) > oldest:
                requests += words.get_int(bucket + BUCKET_REQUESTS)
                failures += words.get_int(bucket + BUCKET_FAILURES)
        return requests, failures

    def _is_rate_exceeded(self, words: Words, now: float) -> bool:
        requests, failures = self._in_window(words, now)
        return requests >= self.section.min_requests and failures >= self.section.failure_rate * requests

    # --- looking at it

    def view(self, words: Words, now: float) -> BreakerView:
        """An open breaker whose time is over is shown as half-open, though no request has made it so yet."""
        state = State(words.get_int(B_STATE))
        if state is State.OPEN and self._may_probe(words, now, state):
            state = State.HALF_OPEN
        requests, failures = self._in_window(words, now)
        return BreakerView(
            state=state,
            since=words.get_real(B_SINCE),
            failures_in_a_row=words.get_int(B_FAILURES),
            requests=requests,
            failures=failures,
            openings=words.get_int(B_OPENINGS),
            is_probed=bool(words.get_int(B_HOLDER)) and now < words.get_real(B_LEASE_END),
        )


class SavedBreaker(NamedTuple):
    """Of a breaker that is not closed: what is worth keeping over a restart of the daemon."""

    open_s: float | None
    """Seconds since it opened; None: a probe is due, whatever the timeout."""
    openings: int


def saved(words: Words, now: float) -> SavedBreaker | None:
    """None: it is closed."""
    state = words.get_int(B_STATE)
    if state == State.CLOSED:
        return None
    open_s = max(now - words.get_real(B_SINCE), 0.0) if state == State.OPEN else None
    return SavedBreaker(open_s, words.get_int(B_OPENINGS))


def recall(words: Words, before: SavedBreaker, now: float, away_s: float) -> None:
    """Open again, as `saved` told it `away_s` ago, unless something was seen of the worker since."""
    if words.get_int(B_OPENINGS):
        return
    words.set_real(B_SINCE, now - (_LONG_S if before.open_s is None else before.open_s + away_s))
    words.set_int(B_OPENINGS, max(before.openings, 1))
    _void_tickets(words)
    words.set_int(B_STATE, State.OPEN)


def _void_tickets(words: Words) -> int:
    """From here on only the returned ticket is good."""
    serial = words.get_int(B_SERIAL) + 1
    words.set_int(B_SERIAL, serial)
    return serial


_REACTIONS: dict[tuple[int, Verdict], Callable[[Breaker, Words, float], None]] = {
    (State.CLOSED, Verdict.SUCCESS): Breaker._succeeded,
    (State.CLOSED, Verdict.FAILURE): Breaker._failed,
    (State.HALF_OPEN, Verdict.SUCCESS): Breaker._probe_succeeded,
    (State.HALF_OPEN, Verdict.FAILURE): Breaker._probe_failed,
    (State.HALF_OPEN, Verdict.NEUTRAL): Breaker._probe_told_nothing,
}
