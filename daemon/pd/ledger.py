"""How the pairs of a prefill and a decode worker fared, shared by all shards.

Theory of operation. When a transfer fails, an error of one engine may be the other one's fault, or that of the way
between them (a network, SGLang's `failed_sessions`, which a prefill worker never forgets). One row per pair says what
the pair did last, and that is enough to judge:

    the prefill worker   the decode worker    charged
    works with others    works with others    the pair: after `ban_after` such failures in a row nobody pairs the
                                              two for `ban_s`, then the next failure bans them again
    works with others    does not             the decode worker
    does not             works with others    the prefill worker
    does not             does not             whoever failed with more others; nobody, if that is equal

"Works with others": its last request with another partner went well, not longer than WINDOW_S ago. A worker that is not
charged has a neutral verdict at its breaker, so nobody's breaker opens for what a partner did.

Failures of attempts that were under way at the same time are one piece of news: when a thousand requests start at once
and one transfer in twenty fails, all that fail do so before the first success, and would look like a broken worker. So
a failure counts, for a ban as for a charge, if its attempt began after the one that counted before it was known.

A ban never leaves a worker without partners: it is overruled then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from pointsman.daemon.resilience.table import Table
from pointsman.daemon.resilience.words import Words

PAIRS = 4096
WINDOW_S = 60.0
_FAILURES, _AT, _BANNED_UNTIL = range(3)
"""of a pair's row; in a worker's row `_AT` is when it was charged last"""


class Charge(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    PAIR = "pair"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Fared:
    """What a pair did last."""

    failures: int
    """in a row"""
    at: float
    banned_until: float


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt whose failure is an open question. Keys are those of the ledger's rows."""

    pair: int
    prefill: int
    decode: int
    of_prefill: Collection[int]
    """the pairs of the prefill worker with other decode workers"""
    of_decode: Collection[int]
    began: float
    """when both legs, or the first one, were sent: seconds of the clock of `now`"""


class Ledger:
    """Keys name a pair; the caller holds the mutex of `words` for the whole of every call."""

    def __init__(self, table: Table, ban_after: int, ban_s: float) -> None:
        self._table = table
        self.ban_after = ban_after
        self.ban_s = ban_s

    def fared(self, words: Words, key: int) -> Fared | None:
        row = self._table.find(words, key)
        if row is None:
            return None
        return Fared(words.get_int(row), words.get_real(row + _AT), words.get_real(row + _BANNED_UNTIL))

    def succeeded(self, words: Words, key: int, now: float) -> None:
        row = self._claim(words, key)
        words.set_real(row + _AT, now)
        words.set_int(row, 0)

    def failed(self, words: Words, attempt: Failed, now: float) -> tuple[Charge, bool]:
        """Returns who is charged, and whether the pair is banned by this failure."""
        prefill_works, prefill_fails = self._with_others(words, attempt.of_prefill, now)
        decode_works, decode_fails = self._with_others(words, attempt.of_decode, now)
        failures, is_news = self._count(words, attempt, now)
        if prefill_works and decode_works:
            return Charge.PAIR, is_news and self._may_ban(words, attempt.pair, failures, now)
        if prefill_works or decode_works:
            charge = Charge.DECODE if prefill_works else Charge.PREFILL
        elif prefill_fails == decode_fails:
            return Charge.NOBODY, False
        else:
            charge = Charge.PREFILL if prefill_fails > decode_fails else Charge.DECODE
        key = attempt.prefill if charge is Charge.PREFILL else attempt.decode
        return (charge if self._is_charged(words, key, attempt.began, now) else Charge.NOBODY), False

    def _count(self, words: Words, attempt: Failed, now: float) -> tuple[int, bool]:
        """(the pair's failures in a row, whether this one is news)."""
        row = self._claim(words, attempt.pair)
        failures = words.get_int(row)
        is_news = not failures or attempt.began >= words.get_real(row + _AT)
        if is_news:
            failures += 1
            words.set_int(row, failures)
            words.set_real(row + _AT, now)
        return failures, is_news

    def _may_ban(self, words: Words, pair: int, failures: int, now: float) -> bool:
        row = self._claim(words, pair)
        if failures < self.ban_after or words.get_real(row + _BANNED_UNTIL) > now:
            return False
        words.set_real(row + _BANNED_UNTIL, now + self.ban_s)
        return True

    def _is_charged(self, words: Words, worker: int, began: float, now: float) -> bool:
        row = self._claim(words, worker)
        if began < words.get_real(row + _AT):
            return False
        words.set_real(row + _AT, now)
        return True

    def is_banned(self, words: Words, key: int, now: float) -> bool:
        row = self._table.find(words, key)
        return row is not None and words.get_real(row + _BANNED_UNTIL) > now

    def _claim(self, words: Words, key: int) -> int:
        return self._table.claim(words, key, lambda row: words.get_real(row + _AT))

    def _with_others(self, words: Words, keys: Iterable[int], now: float) -> tuple[int, int]:
        works = fails = 0
        for key in keys:
            fared = self.fared(words, key)
            if fared is not None and now - fared.at <= WINDOW_S:
                works += fared.failures == 0
                fails += fared.failures > 0
        return works, fails


def partners(pairs: Sequence[tuple[int, int]], banned: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
    """The `pairs` (of positions) without the banned ones, except where a worker would have no partner left."""
    left = [pair for pair in pairs if pair not in banned]
    served = {prefill for prefill, _ in left}, {decode for _, decode in left}
    return [p for p in pairs if p not in banned or p[0] not in served[0] or p[1] not in served[1]]
