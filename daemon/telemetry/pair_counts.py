"""What became of the legs of prefill/decode pairs: one row of words per shard, its own; readers add up.

Words 0 … 63 count, then come two histograms in the form of `telemetry.series`.
"""

from __future__ import annotations

from bisect import bisect_left

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.layout import BUCKETS_S, HISTOGRAM_COUNT, HISTOGRAM_SUM_US, HISTOGRAM_WORDS
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.series import Histogram

LEGS = ("prefill", "decode")
CAUSES = ("connect", "reset", "timeout", "overloaded", "status", "error_event", "no_params")
"""Label `cause` by index."""
EVENTS = ("ban", "open_failure", "lease_end", "decode_alone", "combined", "memory_wait", "memory_refused")
"""What may become of pairs as such, by index."""
STAGES = ("prefill", "transfer")
"""Seconds from the sending of the prefill leg to its first token; from there to decode's first byte."""

_REQUESTS, _ERRORS, _EVENTS, _HISTOGRAMS = 2, 8, 32, 64


class PairCounts:
    """The write side of one shard."""

    __slots__ = ("_cells", "_row")

    def __init__(self, segment: Segment, shard: int) -> None:
        self._cells = segment.cells
        self._row = segment.layout.pair_row(shard)

    def take_rooms(self, count: int) -> int:
        """How many rooms this shard had taken before these."""
        taken = self._cells[self._row + at.PAIR_ROOMS]
        self._cells[self._row + at.PAIR_ROOMS] = taken + count
        return taken

    def sent(self, leg: int) -> None:
        self._cells[self._row + _REQUESTS + leg] += 1

    def failed(self, leg: int, cause: str) -> None:
        self._cells[self._row + _ERRORS + leg * len(CAUSES) + CAUSES.index(cause)] += 1

    def event(self, name: str) -> None:
        self._cells[self._row + _EVENTS + EVENTS.index(name)] += 1

    def observe(self, stage: str, seconds: float) -> None:
        row = self._row + _HISTOGRAMS + STAGES.index(stage) * HISTOGRAM_WORDS
        self._cells[row + bisect_left(BUCKETS_S, seconds)] += 1
        self._cells[row + HISTOGRAM_COUNT] += 1
        self._cells[row + HISTOGRAM_SUM_US] += int(seconds * 1e6)


def _total(segment: Segment, word: int) -> int:
    return sum(segment.cells[segment.layout.pair_row(shard) + word] for shard in range(segment.layout.shards))


def requests(segment: Segment) -> dict[str, int]:
    """By leg."""
    return {leg: _total(segment, _REQUESTS + i) for i, leg in enumerate(LEGS)}


def errors(segment: Segment) -> dict[tuple[str, str], int]:
    """By leg and cause."""
    return {
        (leg, cause): _total(segment, _ERRORS + i * len(CAUSES) + j)
        for i, leg in enumerate(LEGS)
        for j, cause in enumerate(CAUSES)
    }


def events(segment: Segment) -> dict[str, int]:
    return {name: _total(segment, _EVENTS + i) for i, name in enumerate(EVENTS)}


def seconds(segment: Segment, stage: str) -> Histogram:
    first = _HISTOGRAMS + STAGES.index(stage) * HISTOGRAM_WORDS
    buckets = tuple(_total(segment, first + i) for i in range(len(BUCKETS_S) + 1))
    return Histogram(buckets, _total(segment, first + HISTOGRAM_SUM_US) / 1e6)
