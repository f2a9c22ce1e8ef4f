"""A table of keys in words: fixed size, so that keys that nobody bounds (users, API keys) cannot fill the memory.

Theory of operation. A row is ROW_WORDS words: the key, then what the owner of the table keeps. A key lives in one
of the PROBES rows that begin at its hash. When all of them are taken, the row that is worth least to the owner
goes: for both users of this table (attained service, rates) a forgotten key is one in its first state, so the row
next to that is the one that loses nothing. A key is never 0, which marks a row that was never used; rows are not
emptied, so a search ends at the first such row.

Claiming stores the values as zeros before the key: nobody inherits what another key did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pointsman.daemon.resilience.words import Words

ROW_WORDS = 4
VALUE_WORDS = ROW_WORDS - 1
PROBES = 8

_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` rows from the word `first` on; `rows` is a power of two, at least PROBES."""

    first: int
    rows: int

    def __post_init__(self) -> None:
        if self.rows < PROBES or self.rows & (self.rows - 1):
            raise ValueError(f"rows is {self.rows}, not a power of two from {PROBES} on")

    @property
    def words(self) -> int:
        return self.rows * ROW_WORDS

    def find(self, words: Words, key: int) -> int | None:
        """Index of the first value of `key` (a signed 64-bit number)."""
        for row in self._rows_of(key):
            held = words.get_int(row)
            if held == (key or 1):
                return row + 1
            if not held:
                return None
        return None

    def claim(self, words: Words, key: int, worth: Callable[[int], float]) -> int:
        """As `find`, after making a row for a new key; `worth` rates a row by the index of its first value."""
        least, least_worth = -1, 0.0
        for row in self._rows_of(key):
            held = words.get_int(row)
            if held == (key or 1):
                return row + 1
            if not held:
                least = row
                break
            value = worth(row + 1)
            if least < 0 or value < least_worth:
                least, least_worth = row, value
        for index in range(least + 1, least + ROW_WORDS):
            words.set_int(index, 0)
        words.set_int(least, key or 1)
        return least + 1

    def _rows_of(self, key: int) -> list[int]:
        start = (key * _MIX & _MASK) >> 32
        return [self.first + (start + step) % self.rows * ROW_WORDS for step in range(PROBES)]
