"""One timer for the deadlines of all requests of a shard.

A timer of the event loop for every request would cost more than all else that is done about its deadlines, which are
minutes away and hardly ever met. Here arming and disarming are an insertion into a set and a removal from it; the
loop's one timer turns while something is armed. Deadlines are late by at most RESOLUTION_S.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

RESOLUTION_S = 0.025
_TICKS_PER_S, _NEVER = 1 / RESOLUTION_S, inf


class Armed:
    """What has a deadline; a C struct (wheel.pxd)."""

    tick: int
    """The wheel's; 0 = not armed"""

    def look(self, now: float) -> float:
        """Its time has come. Returns when to ask again, infinity = never."""
        raise NotImplementedError


CallLater = Callable[[float, Callable[[], None]], object]


class Wheel:
    def __init__(self, now: Callable[[], float], call_later: CallLater) -> None:
        self._now = now
        self._call_later = call_later
        self._ticks: dict[int, set[Armed]] = {}
        self._turned = 0
        self._is_turning = False

    def __len__(self) -> int:
        return sum(map(len, self._ticks.values()))

    def arm(self, item: Armed, at: float) -> None:
        """In the place of what was armed before for the same item."""
        if item.tick:
            self.disarm(item)
        if at == _NEVER:
            return
        tick = int(at * _TICKS_PER_S) + 1
        if not self._is_turning:
            self._is_turning = True
            self._turned = int(self._now() * _TICKS_PER_S)
            self._call_later(RESOLUTION_S, self._turn)
        if tick <= self._turned:
            tick = self._turned + 1
        armed = self._ticks.get(tick)
        if armed is None:
            armed = self._ticks[tick] = set()
        armed.add(item)
        item.tick = tick

    def disarm(self, item: Armed) -> None:
        tick, item.tick = item.tick, 0
        armed = self._ticks.get(tick)
        if armed is not None:
            armed.discard(item)
            if not armed:
                del self._ticks[tick]

    def _turn(self) -> None:
        now = self._now()
        last = int(now * _TICKS_PER_S)
        due: list[Armed] = []
        for tick in range(self._turned + 1, last + 1):
            due += self._ticks.pop(tick, ())
        self._turned = last
        for item in due:
            item.tick = 0
        for item in due:
            if not item.tick:
                self.arm(item, item.look(now))
        self._is_turning = bool(self._ticks)
        if self._is_turning:
            self._call_later(RESOLUTION_S, self._turn)
