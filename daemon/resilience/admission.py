"""Admission: so many requests at once over all shards, and a bounded, fair queue for the others.

Theory of operation. A request holds a permit until its answer has ended. Who finds none waits *in its shard*; the
shared words say only how many permits each shard holds, how many wait there and the rank of the best of them:

    accounts                 attained service of users (`accounts`)
    one row per shard        IN_USE, WAITING, BEST_RANK, POLLED_AT; written by that shard alone
                             zeroed by whoever reaps it: its permits and places return at once

**Rank.** Lower goes first, and it is fixed on arrival:

    rank = arrival + ageing_s · (class + share)

`class` is 0, 1, 2, 3; `share` (0 … 1) is the part of the recent tokens that this user got (least attained service
first). Everybody ages at the same pace, so the order of two waiters never changes, and nothing has to be sorted
again. And nobody starves: whoever waits is overtaken only by requests that came at most `ageing_s · (class +
share)` after it, at most 4 · ageing_s. How long a prompt is does not matter to the rank; it counts only as service
to its user.

**Many shards as one.** A shard lets its best waiter in iff

    free permits  >  better ranked best waiters of other shards

so that for each of those one permit stays free. Every shard with waiters polls at least each `POLL_S`; a shard that
has not for `STALE_S` is stopped or dead, and nobody leaves permits for it. What differs from one queue in one
process:

1. the limit and the queue's bound are exact, always: all is done under the mutex;
2. once every shard has polled, no permit is free while somebody waits. So one stays free for at most POLL_S (STALE_S
   if the shard it is meant for stands still; one round more if the waiter it was left to went away). `next_shard`
   says whom to wake: then it is as long as the waking takes;
3. the best waiter of a shard is never overtaken while its shard polls. The others of it may be, by no more requests
   than there are permits that come free between two polls of it;
4. a full queue sheds the worst waiter *of the shard where the newcomer is*, or the newcomer itself.

**Full queue.** The newcomer is refused at once, unless its rank is better than that of the shard's last waiter (a
higher class, or a user with less service): then that one goes. Otherwise a single user could fill the queue against
all others.

Methods return the waiters whose state they changed, in that order. Permits and places come back by `leave`, once
for every waiter that `enter` took, whatever happened to it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from pointsman.config.resilience import AdmissionSection
from pointsman.daemon.resilience.accounts import Accounts
from pointsman.daemon.resilience.waiting import Line, Waiter, WaiterState
from pointsman.daemon.resilience.words import Words

POLL_S = 0.005
STALE_S = 4 * POLL_S

USERS = 1024
"""Rows of the table of accounts."""

SHARD_WORDS = 8
IN_USE, WAITING = range(2)
BEST_RANK, POLLED_AT = 2, 3  # doubles


@dataclass(frozen=True, slots=True)
class Usage:
    """Over all shards."""

    in_use: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a request is answered that was not admitted."""

    status: int
    code: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Admission:
    """For `shards` shards; settings may differ from call to call (they are read live), `shards` and `users` not."""

    section: AdmissionSection
    shards: int
    users: int = USERS

    @property
    def words(self) -> int:
        """How many it needs."""
        return self.shards * SHARD_WORDS + self.accounts.words

    @property
    def accounts(self) -> Accounts:
        return Accounts(self.shards * SHARD_WORDS, self.users, self.section.half_life_s)

    # --- by the shard that the waiters are in

    def enter(self, words: Words, line: Line, now: float, waiter: Waiter) -> list[Waiter]:
        """A request comes; look at its state afterwards. Never waits."""
        section = self.section
        if not section.max_concurrent_requests and not len(line):
            waiter.state = WaiterState.ADMITTED
            waiter.since = now
            waiter.estimate = 0.0  # nobody queues: nothing is charged, nothing is to be corrected
            _add(words, _row(line.shard) + IN_USE, 1)
            return [waiter]
        share = self.accounts.share(words, waiter.user, now)
        waiter.since = now
        waiter.deadline = now + section.queue_timeout_s
        waiter.rank = now + section.ageing_s * (waiter.priority + share)
        self.accounts.charge(words, waiter.user, now, waiter.estimate)
        line.add(waiter)
        changed = self._advance(words, line, now)
        if waiter.state is WaiterState.WAITING and self.usage(words).waiting > section.queue_size:
            changed.append(self._shed(words, line, now, waiter))
        return changed

    def poll(self, words: Words, line: Line, now: float) -> list[Waiter]:
        """Admit and expire. At least every POLL_S while somebody waits in `line`, and when `next_shard` named it."""
        return self._advance(words, line, now)

    def leave(self, words: Words, line: Line, now: float, waiter: Waiter, tokens: float | None = None) -> list[Waiter]:
        """The request has ended, wherever it was. `tokens` were served to it; None = not known, the estimate stands.

        Calling it again does nothing.
        """
        state = waiter.state
        if state is WaiterState.ADMITTED:
            waiter.state = WaiterState.DONE
            _add(words, _row(line.shard) + IN_USE, -1)
            if tokens is not None and self.section.max_concurrent_requests:
                self.accounts.charge(words, waiter.user, now, tokens - waiter.estimate)
        elif state is WaiterState.WAITING:
            self._remove(words, line, now, waiter, WaiterState.DONE)
        else:
            waiter.state = WaiterState.DONE
            return []
        return self._advance(words, line, now)

    # --- by anybody

    def next_shard(self, words: Words, now: float) -> int | None:
        """Which shard would get the next free permit; None when there is none, or nobody waits."""
        if self._free(words) <= 0:
            return None
        rivals = self._rivals(words, now)
        return rivals[0][1] if rivals else None

    def reclaim(self, words: Words, shard: int) -> None:
        """Give back all that a dead shard held. After it has been reaped, before its successor starts."""
        for word in range(SHARD_WORDS):
            words.set_int(_row(shard) + word, 0)

    def usage(self, words: Words) -> Usage:
        rows = [_row(shard) for shard in range(self.shards)]
        return Usage(
            sum(words.get_int(row + IN_USE) for row in rows), sum(words.get_int(row + WAITING) for row in rows)
        )

    def refusal(self, waiter: Waiter) -> Refusal:
        """For a waiter that is REFUSED, DISPLACED or EXPIRED."""
        section = self.section
        if waiter.state is WaiterState.EXPIRED:
            return Refusal(section.queue_timeout_status, "admission_queue_timeout", section.retry_after_s)
        return Refusal(429, "admission_queue_full", section.retry_after_s)

    # --- within

    def _advance(self, words: Words, line: Line, now: float) -> list[Waiter]:
        # Whoever may be admitted is, also at the last moment: expiry comes second.
        changed = self._admit(words, line, now)
        while waiter := line.expired(now):
            self._remove(words, line, now, waiter, WaiterState.EXPIRED)
            changed.append(waiter)
        self._publish(words, line, now)
        return changed

    def _admit(self, words: Words, line: Line, now: float) -> list[Waiter]:
        admitted: list[Waiter] = []
        free = self._free(words)
        if free <= 0 or not len(line):
            return admitted
        rivals = [rival for rival in self._rivals(words, now) if rival[1] != line.shard]
        while (best := line.best) and free - len(admitted) > bisect_left(rivals, (best.rank, line.shard)):
            line.remove(best, WaiterState.ADMITTED)
            admitted.append(best)
        _add(words, _row(line.shard) + IN_USE, len(admitted))
        return admitted

    def _free(self, words: Words) -> float:
        limit = self.section.max_concurrent_requests
        return limit - self.usage(words).in_use if limit else math.inf

    def _rivals(self, words: Words, now: float) -> list[tuple[float, int]]:
        """(rank, shard) of the best waiters of the shards that are awake, best first."""
        rows = [(shard, _row(shard)) for shard in range(self.shards)]
        return sorted(
            (words.get_real(row + BEST_RANK), shard)
            for shard, row in rows
            if words.get_int(row + WAITING) and words.get_real(row + POLLED_AT) >= now - STALE_S
        )

    def _shed(self, words: Words, line: Line, now: float, newcomer: Waiter) -> Waiter:
        worst = line.worst
        state = WaiterState.REFUSED if worst is newcomer else WaiterState.DISPLACED
        self._remove(words, line, now, worst, state)
        self._publish(words, line, now)
        return worst

    def _remove(self, words: Words, line: Line, now: float, waiter: Waiter, state: WaiterState) -> None:
        line.remove(waiter, state)
        self.accounts.charge(words, waiter.user, now, -waiter.estimate)

    def _publish(self, words: Words, line: Line, now: float) -> None:
        row = _row(line.shard)
        words.set_int(row + WAITING, len(line))
        words.set_real(row + BEST_RANK, line.best.rank if line.best else 0.0)
        words.set_real(row + POLLED_AT, now)


def _row(shard: int) -> int:
    return shard * SHARD_WORDS


def _add(words: Words, index: int, value: int) -> None:
    words.set_int(index, words.get_int(index) + value)
