"""How many lines may be under way: additive increase, multiplicative decrease. Pure.

Live traffic goes first. Every `TICK_S` the runner tells what it has seen since the last tick:

* answers that say "too much" (429, 503, no answer at all) and worker failures;
* what live streams waited for their first byte, from the shards' own counters;
* how many requests wait inside the engines, where they tell.

Any sign of crowding cuts the limit to `DECREASE` of it, at most once in `HOLD_S` (what was cut needs time to show), and
for one report of the engines once: they report every few seconds. Until the next one, nothing grows.
Otherwise, and only while the limit is used, it grows by one, or by a tenth while it has not met resistance yet.

**Live traffic is hurt** when the recent time to first byte exceeds `SLOWDOWN` times its usual one. "Usual" is the
lower quartile of the last `MEMORY` windows: it follows a change of the load within minutes, and the windows in which
the batch itself did harm do not make it. A window needs `LEAST_SAMPLES` streams, else chance would decide.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

TICK_S = 0.5
DECREASE = 0.6
HOLD_S = 2.0
SLOWDOWN = 1.2
SLACK_S = 0.005
"""below this difference nobody is hurt"""
MEMORY = 240
LEAST_SAMPLES = 8
_SMOOTHING = 0.4
_START = 4.0


@dataclass(frozen=True, slots=True)
class Seen:
    """Since the last tick; the totals are the shards' counters."""

    in_flight: int
    crowded: int = 0
    """answers that told us to send less"""
    live_streams: int = 0
    live_first_byte_s: float = 0.0
    """sum over these streams"""
    engine_waiting: float | None = None
    """requests that wait inside engines, per engine, as last reported; None = no engine tells"""
    is_waiting_new: bool = False
    """it was reported since the last tick"""


class Concurrency:
    def __init__(self, most: int) -> None:
        self._most = float(max(1, most))
        self._limit = min(_START, self._most)
        self._has_met_resistance = False
        self._held_until = 0.0
        self._streams = 0
        self._first_byte_s = 0.0
        self._windows: deque[float] = deque(maxlen=MEMORY)
        self._recent: float | None = None

    @property
    def limit(self) -> int:
        return int(self._limit)

    @property
    def usual_first_byte_s(self) -> float | None:
        if not self._windows:
            return None
        return sorted(self._windows)[len(self._windows) // 4]

    def tick(self, seen: Seen, now: float) -> int:
        """The new limit, at least 1."""
        is_hurt = self._is_live_hurt(seen)
        has_queue = (seen.engine_waiting or 0.0) >= 1.0
        if is_hurt or seen.crowded or (has_queue and seen.is_waiting_new):
            self._has_met_resistance = True
            if now >= self._held_until:
                self._limit = max(1.0, self._limit * DECREASE)
                self._held_until = now + HOLD_S
        elif seen.in_flight >= self.limit and now >= self._held_until and not has_queue:
            self._limit = min(self._most, self._limit + self._step())
        return self.limit

    def _step(self) -> float:
        return 1.0 if self._has_met_resistance else max(1.0, self._limit * 0.1)

    def _is_live_hurt(self, seen: Seen) -> bool:
        self._streams += seen.live_streams
        self._first_byte_s += seen.live_first_byte_s
        if self._streams < LEAST_SAMPLES:
            return False
        window = self._first_byte_s / self._streams
        self._streams, self._first_byte_s = 0, 0.0
        recent = window if self._recent is None else self._recent + _SMOOTHING * (window - self._recent)
        self._recent = recent
        self._windows.append(window)
        usual = self.usual_first_byte_s
        assert usual is not None
        return recent > usual * SLOWDOWN and recent > usual + SLACK_S
