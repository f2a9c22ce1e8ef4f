"""How many retries all shards together may make: a share of the requests, and a floor.

Theory of operation. Two pots, as in Finagle's RetryBudget:

* every request puts `budget_ratio` into the pot of the requests. What is in it fades with a time constant of
  `WINDOW_S`, so that a quiet hour does not pay for a storm: at R requests a second it never holds more than about R
  · ratio · WINDOW_S;
* the reserve fills at `budget_min_per_s` and holds what `WINDOW_S` brings. It is kept as what is *missing* from it:
  zeroed words are a full reserve.

A retry takes 1, from the pot first (it fades, the reserve does not). So over any time t:

    retries  ≤  budget_ratio · requests  +  budget_min_per_s · (t + WINDOW_S)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pointsman.config.resilience import RetrySection
from pointsman.daemon.resilience.words import Words

WINDOW_S = 10.0
"""Finagle's default ttl."""

WORDS = 4
B_POT, B_MISSING, B_AT = range(3)  # doubles: retries, retries, seconds

_ROUNDING = 1e-9
"""Five requests at 0.2 pay for one retry, whatever binary fractions add up to."""


@dataclass(frozen=True, slots=True)
class RetryBudget:
    section: RetrySection

    def deposit(self, words: Words, now: float) -> None:
        """Once per request, whatever becomes of it; not per attempt."""
        pot, _ = self._bring_up_to(words, now)
        words.set_real(B_POT, pot + self.section.budget_ratio)

    def withdraw(self, words: Words, now: float) -> bool:
        """Whether a retry may be made; if so it is paid for."""
        pot, missing = self._bring_up_to(words, now)
        if pot + self._reserve(missing) < 1.0 - _ROUNDING:
            return False
        from_pot = min(pot, 1.0)
        words.set_real(B_MISSING, missing + 1.0 - from_pot)
        words.set_real(B_POT, pot - from_pot)
        return True

    def balance(self, words: Words, now: float) -> float:
        """Retries that could be made now."""
        pot, missing = self._at(words, now)
        return pot + self._reserve(missing)

    def _reserve(self, missing: float) -> float:
        # Less than nothing right after the floor was lowered: then nothing is there until the rest is paid back.
        return max(self.section.budget_min_per_s * WINDOW_S - missing, 0.0)

    def _at(self, words: Words, now: float) -> tuple[float, float]:
        elapsed = max(now - words.get_real(B_AT), 0.0)
        pot = words.get_real(B_POT) * math.exp(-elapsed / WINDOW_S)
        return pot, max(words.get_real(B_MISSING) - self.section.budget_min_per_s * elapsed, 0.0)

    def _bring_up_to(self, words: Words, now: float) -> tuple[float, float]:
        pot, missing = self._at(words, now)
        if now > words.get_real(B_AT):
            # Whoever dies in between has faded the pot twice, or not filled the reserve: never made budget twice.
            words.set_real(B_POT, pot)
            words.set_real(B_AT, now)
            words.set_real(B_MISSING, missing)
        return pot, missing
