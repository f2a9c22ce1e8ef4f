"""What the live traffic feels, read from shared memory: the batch runner's reason to step back. Read only."""

from __future__ import annotations

import time

import msgspec

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

FRESH_S = 5.0
"""an engine's report that is older says nothing of now"""


class Live(msgspec.Struct, frozen=True):
    """Since the last look."""

    streams: int = 0
    """that got their first byte"""
    first_byte_s: float = 0.0
    """sum of their times to it"""
    engine_waiting: float | None = None
    """requests that wait inside engines, per engine, as last reported; None = none tells"""
    is_waiting_new: bool = False
    """it was reported since the last look"""


class LiveTraffic:
    """Lines of batches are never streams, so what the shards count of streams is live traffic alone."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._last = self._totals()
        self._last_report_at_s = 0.0

    def look(self) -> Live:
        streams, first_byte_us = self._totals()
        before, self._last = self._last, (streams, first_byte_us)
        return Live(streams - before[0], max(0, first_byte_us - before[1]) / 1e6, *self._engine_waiting())

    def _totals(self) -> tuple[int, int]:
        slots = range(self._segment.layout.slots)
        total = self._segment.total
        return sum(total(slot, at.L_PREDICTIONS) for slot in slots), sum(total(slot, at.L_REAL_US) for slot in slots)

    def _engine_waiting(self) -> tuple[float | None, bool]:
        segment = self._segment
        oldest = time.monotonic() - FRESH_S
        told = [
            (signals.waiting, signals.at_s)
            for slot in range(segment.layout.slots)
            if segment.status(slot) == at.STATUS_UP
            and (signals := segment.signals(slot)) is not None
            and signals.waiting is not None
            and signals.at_s > oldest
        ]
        if not told:
            return None, False
        before, self._last_report_at_s = self._last_report_at_s, max(at_s for _, at_s in told)
        return sum(waiting for waiting, _ in told) / len(told), self._last_report_at_s > before
