"""The machines of `resilience` over shared memory: one retry budget, one breaker per worker, one queue for all shards.

Every call takes the routing mutex for as long as a few words are read and written. A mutex that is not to be had in
time (its holder is stopped) never holds up a request: it is let pass, nothing is counted.

What happens to every request is cheap on purpose. A success on a closed breaker and the deposit into the budget are
done natively, in the same critical section as the booking (`shm.choosing`); `is_quiet` is one word that says that no
breaker is anything but closed; a permit without a limit is one word of the shard's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from pointsman.config.resilience import AdmissionSection, BreakerSection, LimitsSection, RetrySection
from pointsman.config.snapshot import Shared
from pointsman.daemon.errors import breaker_open
from pointsman.daemon.resilience import admission, breaker, budget
from pointsman.daemon.resilience.admission import Admission, Usage
from pointsman.daemon.resilience.breaker import UNCOUNTED, Breaker, BreakerView, SavedBreaker, Verdict
from pointsman.daemon.resilience.budget import RetryBudget
from pointsman.daemon.resilience.ejection import Candidate, overruled
from pointsman.daemon.resilience.rates import KeyRates, RequestRate
from pointsman.daemon.resilience.retry import without_failed
from pointsman.daemon.resilience.table import ROW_WORDS, Table
from pointsman.daemon.resilience.waiting import Line, Waiter
from pointsman.daemon.resilience.words import MemoryWords
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.native import key_of_bytes
from pointsman.daemon.shm.routing_state import RoutingState

if TYPE_CHECKING:  # the supervisor uses this without any routing
    from pointsman.daemon.routing.table import Pool

if (
    breaker.WORDS > at.BREAKER_WORDS
    or budget.WORDS > at.BUDGET_WORDS
    or (admission.SHARD_WORDS, admission.USERS, ROW_WORDS)
    != (at.ADMISSION_SHARD_WORDS, at.ADMISSION_USERS, at.RATE_WORDS)
):
    raise ImportError("layout.py and the machines of resilience do not agree")

LOCK_DEADLINE_US = 2000
_H_BREAKERS = at.H_BREAKERS


@dataclass(frozen=True, slots=True)
class Fit:
    """Who may take an attempt. `overruled`: slots of workers that are let in against their breakers."""

    pool: Pool
    overruled: frozenset[int] = frozenset()


class SharedResilience:
    """As one process sees it; `shard` -1: it only looks (control)."""

    def __init__(self, state: RoutingState, shard: int) -> None:
        layout = state.segment.layout
        self._state = state
        self._all_words = state.segment.words
        self._cells = state.segment.cells
        self._shard = shard
        self._budget = self._words(layout.budget, at.BUDGET_WORDS)
        self._breakers = [self._words(layout.breaker(slot), at.BREAKER_WORDS) for slot in range(layout.slots)]
        self._admission_words = self._words(layout.admission, layout.admission_words)
        self._rate_words = self._words(layout.rates, (at.PROFILE_RATES + at.KEY_RATES) * at.RATE_WORDS)
        self._in_use = layout.admission + max(shard, 0) * at.ADMISSION_SHARD_WORDS + admission.IN_USE
        self._profile_rates = Table(0, at.PROFILE_RATES)
        self._key_rates = KeyRates(Table(at.PROFILE_RATES * at.RATE_WORDS, at.KEY_RATES))
        self.line = Line(max(shard, 0))
        self._waiting = self.line.by_rank
        self.use(BreakerSection(), AdmissionSection())

    def _words(self, first: int, count: int) -> MemoryWords:
        segment = self._state.segment
        return MemoryWords(segment.cells[first : first + count], segment.reals[first : first + count])

    def follow(self, shared: Shared) -> SharedResilience:
        """`use` for those who only look; `shared` is of the configuration in force."""
        self.use(msgspec.convert(shared.breaker, BreakerSection), msgspec.convert(shared.admission, AdmissionSection))
        return self

    def use(self, breaker: BreakerSection, admission: AdmissionSection) -> None:
        """The settings in force from now on; they are one for all profiles."""
        self._breaker = Breaker(breaker)
        self._has_breakers = breaker.enabled
        self._admission = Admission(admission, self._state.segment.layout.shards)
        self._has_limit = bool(admission.max_concurrent_requests)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        with self._state.locked(LOCK_DEADLINE_US) as held:
            yield held

    # --- breakers

    @property
    def breaker_width_s(self) -> float:
        """Of one bucket of the window; 0 = no breakers."""
        section = self._breaker.section
        return section.window_s / breaker.BUCKETS if section.enabled else 0.0

    def is_quiet(self) -> bool:
        """No breaker keeps anybody out."""
        return not (self._has_breakers and self._all_words.get(_H_BREAKERS))

    def fit(self, pool: Pool, failed: Collection[int], now: float) -> Fit:
        """`pool` without those whose breakers keep them out, and without the slots in `failed` as long as others are.

        Raises RequestError 503, with Retry-After, when breakers keep everybody out.
        """
        loads = self._state.words.survey(pool.slots)
        up = [position for position, load in enumerate(loads) if load >= 0]
        if not up:
            raise pool.nobody()
        ruled: frozenset[int] = frozenset()
        allowed = up
        if not self.is_quiet():
            candidates = [self._candidate(pool.slots[position], now) for position in up]
            ruled = overruled(candidates, pool.role, self._breaker.section.max_ejection_ratio)
            allowed = [up[i] for i, each in enumerate(candidates) if not each.is_kept_out or i in ruled]
            if not allowed:
                raise self._nobody(pool, up, now)
        slots = without_failed([pool.slots[position] for position in allowed], failed)
        left = frozenset(slots)
        chosen = [position for position in allowed if pool.slots[position] in left]
        return Fit(pool.only(chosen), frozenset(pool.slots[up[i]] for i in ruled))

    def has_other(self, pool: Pool, failed: Collection[int], now: float) -> bool:
        """Whether somebody who has not failed could take another attempt."""
        words = self._state.words
        return any(
            slot not in failed and (self.is_quiet() or self._breaker.permits(self._breakers[slot], now))
            for slot, load in zip(pool.slots, words.survey(pool.slots), strict=True)
            if load >= 0
        )

    def _candidate(self, slot: int, now: float) -> Candidate:
        words = self._breakers[slot]
        if self._breaker.permits(words, now):
            return Candidate(is_kept_out=False)
        view = self._breaker.view(words, now)
        return Candidate(True, view.failure_share, view.since)

    def _nobody(self, pool: Pool, up: list[int], now: float) -> Exception:
        wait_s = min(self._breaker.retry_after_s(self._breakers[pool.slots[position]], now) for position in up)
        who = "the only healthy worker has" if len(up) == 1 else f"all {len(up)} healthy workers have"
        what = f" for the model {pool.model!r}" if pool.model else ""
        return breaker_open(f"{who} failed too often{what}; the next probe goes out in {wait_s:.1f} s", wait_s)

    def acquire(self, slot: int, now: float) -> int | None:
        """The ticket for one request to a worker whose breaker may not be closed; None: it may not be sent."""
        with self._locked() as held:
            if not held:
                return UNCOUNTED
            ticket = self._breaker.acquire(self._breakers[slot], now, self._shard)
            self._state.count_breakers()
            return ticket

    def record(self, slot: int, ticket: int, verdict: Verdict, now: float) -> None:
        with self._locked() as held:
            if held:
                self._breaker.record(self._breakers[slot], now, ticket, verdict)
                self._state.count_breakers()

    def is_closed(self, slot: int) -> bool:
        return self._breakers[slot].get_int(breaker.B_STATE) == breaker.State.CLOSED

    def view(self, slot: int, now: float) -> BreakerView:
        return self._breaker.view(self._breakers[slot], now)

    def saved(self, slot: int, now: float) -> SavedBreaker | None:
        """What is to be known of the breaker after a restart of the daemon; None: it is closed."""
        return breaker.saved(self._breakers[slot], now)

    def recall(self, slot: int, before: SavedBreaker, now: float, away_s: float) -> None:
        """What `saved` told `away_s` ago."""
        with self._locked() as held:
            if held:
                breaker.recall(self._breakers[slot], before, now, away_s)
                self._state.count_breakers()

    # --- the retry budget

    def withdraw(self, section: RetrySection, now: float) -> bool:
        with self._locked() as held:
            return held and RetryBudget(section).withdraw(self._budget, now)

    def balance(self, section: RetrySection, now: float) -> float:
        """Retries that could be made now."""
        return RetryBudget(section).balance(self._budget, now)

    # --- admission

    def is_unlimited(self) -> bool:
        return not self._has_limit and not self._waiting

    def enter_freely(self) -> None:
        """A permit where there is no limit."""
        self._all_words.add(self._in_use, 1)

    def leave_freely(self) -> None:
        self._all_words.add(self._in_use, -1)

    def enter(self, waiter: Waiter, now: float) -> list[Waiter] | None:
        """Those whose state changed; None: the mutex is not to be had, let it pass with `enter_freely`."""
        with self._locked() as held:
            return self._admission.enter(self._admission_words, self.line, now, waiter) if held else None

    def leave(self, waiter: Waiter, now: float, tokens: float | None) -> list[Waiter] | None:
        """None: not now, try again."""
        with self._locked() as held:
            return self._admission.leave(self._admission_words, self.line, now, waiter, tokens) if held else None

    def poll(self, now: float) -> list[Waiter]:
        with self._locked() as held:
            return self._admission.poll(self._admission_words, self.line, now) if held else []

    def refusal(self, waiter: Waiter) -> admission.Refusal:
        return self._admission.refusal(waiter)

    @property
    def admission(self) -> AdmissionSection:
        return self._admission.section

    def usage(self) -> Usage:
        return self._admission.usage(self._admission_words)

    # --- rates

    def take_request(self, profile: str, limits: LimitsSection, now: float) -> float:
        """0, or seconds until the profile's rate lets the next request pass."""
        words, key = self._rate_words, key_of_bytes(profile.encode())
        with self._locked() as held:
            if not held:
                return 0.0
            index = self._profile_rates.claim(words, key, words.get_real)
            return RequestRate(limits).take(words, index, now)

    def take_for_key(self, key: int, limits: LimitsSection, now: float, tokens: float) -> float:
        """0, or seconds until the rates of an API key let one more request pass, of so many tokens, about."""
        with self._locked() as held:
            return self._key_rates.take(self._rate_words, key, limits, now, tokens) if held else 0.0

    def correct_for_key(self, key: int, limits: LimitsSection, now: float, more_tokens: float) -> None:
        """At the end of a request: what it took of tokens beyond `take_for_key`; negative: less."""
        with self._locked() as held:
            if held:
                self._key_rates.correct(self._rate_words, key, limits, now, more_tokens)

    # --- a shard that is dead

    def reclaim_shard(self, shard: int) -> bool:
        """Its permits, its places in the queue and its probes come back. False: try again.

        After it has been reaped, before its successor starts.
        """
        with self._state.locked() as held:
            if not held:
                return False
            self._admission.reclaim(self._admission_words, shard)
            for words in self._breakers:
                self._breaker.release_shard(words, shard)
            self._state.count_breakers()
            return True
