"""Attained service: how many tokens every user was served lately, over all shards.

Theory of operation. An account halves every `half_life_s`; so does the sum of all, kept beside them. Only the share
matters:

    share = served to the user / served to all          0 … 1, the same at 10 and at 10,000 tokens a second

A request is charged when it starts to wait, with an estimate: otherwise a user who sends a hundred at once would have a
hundred first ones. When it has ended, `correct` puts the real tokens in the place of the estimate. Accounts live in a
`table`; the account that is forgotten for a new one is the smallest of eight, and one that is not there has been served
nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pointsman.daemon.resilience.table import Table
from pointsman.daemon.resilience.words import Words

HEADER_WORDS = 4
A_TOTAL, A_TOTAL_AT = range(2)  # doubles: tokens, seconds

# of a row, after its key: doubles
SERVED, SERVED_AT = range(2)


@dataclass(frozen=True, slots=True)
class Accounts:
    """At the word `first`, for about `rows` users (a power of two)."""

    first: int
    rows: int
    half_life_s: float

    @property
    def words(self) -> int:
        return HEADER_WORDS + self._table.words

    @property
    def _table(self) -> Table:
        return Table(self.first + HEADER_WORDS, self.rows)

    def served(self, words: Words, user: int, now: float) -> float:
        """Tokens; `user` is a 64-bit hash, 0 = all who do not tell."""
        index = self._table.find(words, user)
        return 0.0 if index is None else self._faded(words, index, now)

    def share(self, words: Words, user: int, now: float) -> float:
        total = self._faded(words, self.first, now)
        return min(self.served(words, user, now) / total, 1.0) if total > 0.0 else 0.0

    def charge(self, words: Words, user: int, now: float, tokens: float) -> None:
        """Add tokens, or take them back (negative); no account goes below zero."""
        index = self._table.claim(words, user, lambda row: self._faded(words, row, now))
        self._add(words, index, now, tokens)
        self._add(words, self.first, now, tokens)

    def _faded(self, words: Words, index: int, now: float) -> float:
        elapsed = max(now - words.get_real(index + SERVED_AT), 0.0)
        return words.get_real(index + SERVED) * math.exp2(-elapsed / self.half_life_s)

    def _add(self, words: Words, index: int, now: float, tokens: float) -> None:
        value = max(self._faded(words, index, now) + tokens, 0.0)
        words.set_real(index + SERVED_AT, max(now, words.get_real(index + SERVED_AT)))
        words.set_real(index + SERVED, value)
