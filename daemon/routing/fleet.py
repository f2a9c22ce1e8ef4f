"""What the gateway knows of its workers from what it sent them and saw come back, and what the engines report.

A booking is the charge of one routed request: from the pick to the first token its predicted prefill waits in the
worker's line, from then to the end it is a decoding sequence. All of it is removed at the end, whatever the end was.
Of a *blind* one (its answer is not streamed) nobody sees the first token: once it is first in line it leaves the line
after its predicted seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp2

from pointsman.daemon.routing.cost_model import CostModel, Smoothed
from pointsman.daemon.routing.index import Pin, PlainIndex, PrefixIndex
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN, Chain

RATE_HALF_LIFE_S = 60.0
SIGNAL_STALE_S = 5.0
"""Older reports of an engine are not believed; our own counts stand in."""
USER_HALF_LIFE_S = 150.0
MAX_USERS = 1024
MAX_SESSIONS = 65_536
GHOST_FACTOR = 4
"""Blocks that this many fleets could hold are remembered, to see what a larger cache would have hit."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One engine. `kv_tokens` None: not known, taken as unlimited (a cache believed too small is ruinous)."""

    name: str
    kv_tokens: int | None = None
    weight: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)
    prompt_tokens_min: int = 0
    prompt_tokens_max: int = 2**31 - 1
    """The prompt lengths it takes, both ends included (`promptLenBucketMinLength/MaxLength`)."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What an engine reported at `at_s`; None = it does not tell. Shares are 0..1."""

    at_s: float
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    cpu_kv_usage: float | None = None
    busy: float | None = None
    utilization: float | None = None


class Load:
    """One worker, as booked. Times in seconds, sizes in tokens."""

    __slots__ = (
        "_busy_at",
        "_busy_s",
        "_served",
        "_served_at",
        "blind",
        "decoding",
        "head_s",
        "in_flight",
        "pending",
        "processed",
        "queued_tokens",
        "reserved_chars",
        "signals",
        "tokens",
        "tpot",
        "wait_sum_s",
    )

    def __init__(self) -> None:
        self.in_flight = 0
        self.decoding = 0
        self.pending: dict[int, float] = {}
        """Booking -> predicted prefill seconds, in order, until the first token."""
        self.blind: dict[int, Booking] = {}
        """Those of them whose first token nobody will see."""
        self.wait_sum_s = 0.0
        self.head_s = 0.0
        """When the present head of that line began."""
        self.queued_tokens = 0
        """Uncached prompt tokens of the line."""
        self.tokens = 0
        """Prompt tokens in flight."""
        self.reserved_chars = 0
        """Room that expected outputs of requests in flight take from the cache."""
        self.processed = 0
        self.signals: Signals | None = None
        self.tpot = Smoothed(0.02)
        self._served = 0.0
        self._served_at = 0.0
        self._busy_s = 0.0
        self._busy_at = 0.0

    def wait_s(self, now: float) -> float:
        """Predicted seconds until a request routed now would be first in line."""
        if not self.pending:
            return 0.0
        first = next(iter(self.pending.values()))
        return max(self.wait_sum_s - min(max(now - self.head_s, 0.0), 0.95 * first), 0.0)

    def served(self, now: float) -> float:
        """Tokens of the last minute or so: a sum with a half-life of RATE_HALF_LIFE_S."""
        return self._served * _decay(now - self._served_at)

    def add_served(self, tokens: float, now: float) -> None:
        self._served = self.served(now) + tokens
        self._served_at = now

    def busy(self, now: float) -> float:
        """Share of the last minute or so in which at least one request was in flight."""
        decay = _decay(now - self._busy_at)
        return self._busy_s * decay + (1 - decay if self.in_flight else 0.0)

    def mark_busy(self, now: float) -> None:
        """To be called before `in_flight` changes."""
        self._busy_s = self.busy(now)
        self._busy_at = now

    def fresh_signals(self, now: float) -> Signals | None:
        signals = self.signals
        return signals if signals is not None and now - signals.at_s <= SIGNAL_STALE_S else None


def _decay(elapsed_s: float, half_life_s: float = RATE_HALF_LIFE_S) -> float:
    return exp2(-max(elapsed_s, 0.0) / half_life_s)


class Booking:
    """The charge of one request; see the module."""

    __slots__ = (
        "context",
        "first_token_s",
        "is_blind",
        "is_over",
        "new",
        "number",
        "pin",
        "prefill_s",
        "prompt_tokens",
        "reserved_chars",
        "start_s",
        "user",
        "worker",
    )

    def __init__(self, number: int, worker: int, start_s: float) -> None:
        self.number = number
        self.worker = worker
        self.start_s = start_s
        self.first_token_s: float | None = None
        self.is_blind = False
        self.is_over = False
        self.new = 0
        self.context = 0
        self.prompt_tokens = 0
        self.prefill_s = 0.0
        self.reserved_chars = 0
        self.pin: Pin | None = None
        self.user = ""


class Fleet:
    """All state that picks read and bookings change. In the daemon it is shared by all shards.

    `capacities`: characters of prefix cache per worker that the index may believe in; `follows_engine` says that
    they are the engines' own (then requests in flight take room away from the cache).
    """

    def __init__(
        self, workers: Sequence[Worker], capacities: Sequence[int], ghost_chars: int, *, follows_engine: bool = True
    ) -> None:
        self.workers = tuple(workers)
        self.loads = [Load() for _ in workers]
        self.kv_chars = [None if w.kv_tokens is None else w.kv_tokens * CHARS_PER_TOKEN for w in workers]
        self.capacities = list(capacities)
        self.follows_engine = follows_engine
        # The last slot is the ghost: no worker, but what has been seen lately at all.
        self.index: PrefixIndex = PlainIndex([*capacities, ghost_chars])
        self._ghost_chars = ghost_chars
        self.cost = CostModel()
        self.output_mean = Smoothed(200.0)
        self.stay = Smoothed(5.0)
        self.lost = 0.0
        """Smoothed share of prompt blocks that were seen lately, yet are held by no worker any more."""
        self._users: dict[str, tuple[float, float]] = {}
        """User -> (tokens, as of when), of the MAX_USERS users that came last."""
        self.sessions: dict[str, tuple[int, float]] = {}
        """Session key -> (worker, last use), of the MAX_SESSIONS sessions used last."""
        self._numbers = 0

    def book(
        self,
        worker: int,
        chain: Chain,
        prompt_tokens: int,
        cached_tokens: int,
        now: float,
        *,
        is_pinned: bool = True,
        is_blind: bool = False,
    ) -> Booking:
        """Charges a request with `cached_tokens` of its prompt believed to be held by `worker`."""
        load = self.loads[worker]
        self._numbers += 1
        booking = Booking(self._numbers, worker, now)
        booking.prompt_tokens = prompt_tokens
        booking.context = cached_tokens
        booking.new = prompt_tokens - cached_tokens
        booking.prefill_s = self.cost.seconds(booking.new, cached_tokens)
        load.mark_busy(now)
        load.in_flight += 1
        load.processed += 1
        if not load.pending:
            load.head_s = now
        load.pending[booking.number] = booking.prefill_s
        if is_blind:
            booking.is_blind = True
            load.blind[booking.number] = booking
        load.wait_sum_s += booking.prefill_s
        load.queued_tokens += booking.new
        load.tokens += prompt_tokens
        load.add_served(prompt_tokens, now)
        if is_pinned and self.follows_engine:
            self._reserve(booking, int(self.output_mean.value) * CHARS_PER_TOKEN)
        if chain.hashes:
            if is_pinned:
                booking.pin = self.index.pin(worker, chain)
            else:
                self.index.insert(worker, chain)
            if self._ghost_chars:
                self.index.insert(len(self.workers), chain)
        return booking

    def first_token(self, booking: Booking, now: float) -> None:
        """The prefill is over. A second call, or one after the end, does nothing."""
        if booking.is_over or booking.first_token_s is not None:
            return
        booking.first_token_s = now
        load = self.loads[booking.worker]
        if next(iter(load.pending)) == booking.number:
            self.cost.learn(booking.new, booking.context, now - load.head_s)
        self._leave_line(load, booking, now)
        load.decoding += 1

    def ripen(self, worker: int, now: float) -> None:
        """Blind bookings at the head of the line whose predicted seconds are over leave it."""
        load = self.loads[worker]
        while load.blind and load.pending:
            number, prefill_s = next(iter(load.pending.items()))
            booking = load.blind.get(number)
            ends = load.head_s + prefill_s
            if booking is None or ends > now:
                break
            booking.first_token_s = ends
            self._leave_line(load, booking, ends)
            load.decoding += 1

    def finish(self, booking: Booking, now: float, output_tokens: int | None) -> None:
        """The request ended; `output_tokens` None: it failed or was cancelled, nothing is learned from it.

        An answer whose first token was not seen (not streamed) leaves the line now. A second call does nothing.
        """
        if booking.is_over:
            return
        booking.is_over = True
        load = self.loads[booking.worker]
        load.mark_busy(now)
        load.in_flight -= 1
        load.tokens -= booking.prompt_tokens
        if booking.first_token_s is None:
            self._leave_line(load, booking, now)
        else:
            load.decoding -= 1
        if booking.pin is not None:
            self.index.unpin(booking.pin)
        if booking.reserved_chars:
            self._reserve(booking, 0)
        if booking.user:
            self.charge_user(booking.user, 2.0 * (output_tokens or 0) - 3.0 * booking.prompt_tokens, now)
        if output_tokens is None:
            return
        load.add_served(output_tokens, now)
        self.output_mean.add(output_tokens)
        self.stay.add(now - booking.start_s)
        if booking.first_token_s is not None and output_tokens > 1:
            load.tpot.add((now - booking.first_token_s) / (output_tokens - 1))

    def charge_user(self, user: str, tokens: float, now: float) -> None:
        """Prompt tokens count once, output tokens twice; an answer is guessed at 1.5 x the prompt until it is known."""
        held, at = self._users.pop(user, (0.0, now))
        self._users[user] = (max(held * _decay(now - at, USER_HALF_LIFE_S) + tokens, 0.0), now)
        if len(self._users) > MAX_USERS:
            del self._users[next(iter(self._users))]

    def user_usage(self, user: str, now: float) -> tuple[float, float, float]:
        """(tokens that `user` had lately, least and most of all users), with a half-life of USER_HALF_LIFE_S."""
        usage = {name: held * _decay(now - at, USER_HALF_LIFE_S) for name, (held, at) in self._users.items()}
        if not usage:
            return 0.0, 0.0, 0.0
        return usage.get(user, 0.0), min(usage.values()), max(usage.values())

    def session(self, key: str) -> tuple[int, float] | None:
        """(worker, last use) of a session."""
        return self.sessions.get(key)

    def stick(self, key: str, worker: int, now: float) -> None:
        """The session of `key` is at `worker` now."""
        self.sessions.pop(key, None)
        self.sessions[key] = (worker, now)
        if len(self.sessions) > MAX_SESSIONS:
            del self.sessions[next(iter(self.sessions))]

    def forget(self, worker: int) -> None:
        """The worker's cache is gone: restarted, flushed, or new weights."""
        self.index.remove_worker(worker)

    def set_kv_tokens(self, worker: int, kv_tokens: int) -> None:
        """The engine told its capacity."""
        self.kv_chars[worker] = kv_tokens * CHARS_PER_TOKEN
        if self.follows_engine:
            self.capacities[worker] = kv_tokens * CHARS_PER_TOKEN
            self._set_capacity(worker)

    def _leave_line(self, load: Load, booking: Booking, now: float) -> None:
        load.wait_sum_s -= load.pending.pop(booking.number)
        if booking.is_blind:
            del load.blind[booking.number]
        load.queued_tokens -= booking.new
        load.head_s = now
        if not load.pending:
            load.wait_sum_s = 0.0  # what rounding left

    def _reserve(self, booking: Booking, chars: int) -> None:
        self.loads[booking.worker].reserved_chars += chars - booking.reserved_chars
        booking.reserved_chars = chars
        self._set_capacity(booking.worker)

    def _set_capacity(self, worker: int) -> None:
        if self.kv_chars[worker] is not None:
            self.index.set_capacity(worker, max(self.capacities[worker] - self.loads[worker].reserved_chars, 0))
