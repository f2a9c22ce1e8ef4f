"""When the events of a shard's streams are so many that they are better read in rounds, and when not any more."""

from __future__ import annotations

SAMPLE_EVENTS = 32
BEGINS_AT = 2.0
"""events a round; with fewer, rounds would wake the shard as often as events do"""
ENDS_BELOW = 0.5
"""streams with news a round: well below, because every change has each stream change hands"""
WEIGHT = 1 / 32
"""of the last round, in the average"""


class Pace:
    """Pure. `round_s`: how long a round takes, and an event waits at most; 0: rounds never begin."""

    def __init__(self, round_s: float) -> None:
        self.round_s = round_s
        self._sampled_at = 0.0
        self._found = BEGINS_AT

    def sample(self, now: float) -> bool:
        """Another SAMPLE_EVENTS have passed one by one, the last of them now: whether rounds begin."""
        took_s, self._sampled_at = now - self._sampled_at, now
        self._found = BEGINS_AT
        return took_s * BEGINS_AT < SAMPLE_EVENTS * self.round_s

    def round_over(self, found: int) -> bool:
        """So many streams had news: whether rounds end."""
        self._found += (found - self._found) * WEIGHT
        return self._found < ENDS_BELOW
