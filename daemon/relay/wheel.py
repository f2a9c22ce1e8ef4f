"""One timer for the deadlines of all requests of a shard.

A timer of the event loop for every request would cost more than all else that is done about its deadlines, which are
minutes away and hardly ever met. Here the items of a slot are linked to a ring: to enter and to leave it takes no
object and no hash. The loop's one timer turns while something is armed. Deadlines are late by at most RESOLUTION_S;
those that are more than a turn away are passed once a turn.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

RESOLUTION_S = 0.025
_TICKS_PER_S, _NEVER = 1 / RESOLUTION_S, inf
_SLOTS = 1024
_MASK = _SLOTS - 1


class Armed:
    """What has a deadline; a C struct (wheel.pxd)."""

    tick: int
    """The wheel's; 0 = not armed"""
    _before: Armed | None
    _after: Armed | None
    """its neighbours in the ring, while it is armed"""

    def look(self, now: float) -> float:
        """Its time has come. Returns when to ask again, infinity = never."""
        raise NotImplementedError


def _ring() -> Armed:
    """Where a ring begins and ends; alone it is its own neighbour."""
    ring = Armed()
    ring._before = ring._after = ring
    return ring


CallLater = Callable[[float, Callable[[], None]], object]


class Wheel:
    def __init__(self, now: Callable[[], float], call_later: CallLater) -> None:
        self._now = now
        self._call_later = call_later
        self._rings = [_ring() for _ in range(_SLOTS)]
        self._armed = 0
        self._turned = 0
        self._is_turning = False

    def __len__(self) -> int:
        return self._armed

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
        ring = self._rings[tick & _MASK]
        last = ring._before
        assert last is not None
        item._before, item._after = last, ring
        last._after = ring._before = item
        item.tick = tick
        self._armed += 1

    def disarm(self, item: Armed) -> None:
        if not item.tick:
            return
        before, after = item._before, item._after
        assert before is not None and after is not None
        before._after, after._before = after, before
        item._before = item._after = None  # whoever has left keeps nobody
        item.tick = 0
        self._armed -= 1

    def _turn(self) -> None:
        now = self._now()
        last = int(now * _TICKS_PER_S)
        due: list[Armed] = []
        for tick in range(self._turned + 1, min(last, self._turned + _SLOTS) + 1):
            ring = self._rings[tick & _MASK]
            each = ring._after
            while each is not None and each is not ring:
                following = each._after
                if each.tick <= last:
                    self.disarm(each)
                    due.append(each)
                each = following
        self._turned = last
        for item in due:
            if not item.tick:
                self.arm(item, item.look(now))
        self._is_turning = self._armed > 0
        if self._is_turning:
            self._call_later(RESOLUTION_S, self._turn)
