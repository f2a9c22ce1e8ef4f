"""Request counters and latency histograms in shared memory: how shards write them, and how they are read back.

Theory of operation. Each shard owns one table of pairs (key, count) and one block of histograms; nobody else writes
there, so there is no lock. The table is append-only: a pair's key is stored once, by the shard that first needs it, and
stays for the life of the daemon. A shard that takes over a dead one's row finds its keys there and counts on. A reader
walks from the start to the first empty key; a pair whose key is there but not yet its count reads as 0.

This module is on the request path: it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pointsman.daemon.routing.paths import FORM_PATHS, JSON_PATHS
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.layout import (
    BUCKETS_S,
    HISTOGRAM_KINDS,
    HISTOGRAM_SUM_US,
    HISTOGRAM_WORDS,
)
from pointsman.daemon.shm.segment import Segment

_OURS = ("models", "probe", "extra", "files", "batches", "fan_outs")
ROUTES: tuple[str, ...] = ("other", *JSON_PATHS, *FORM_PATHS, *_OURS)
"""Label `route` by index."""

RESERVED_PAIRS = 512
"""The last pairs of a table are kept for model 0 ("other"), so that a flood of models still counts every request."""

_ROUTE_SHIFT = 48
_MODEL_SHIFT = 16
_MODEL_MASK = 0xFFFF_FFFF
_CODE_MASK = 0xFFFF
_KINDS, _WORDS = HISTOGRAM_KINDS, HISTOGRAM_WORDS

SeriesKey = tuple[int, int, int]
"""(index into ROUTES, index into Snapshot.models, HTTP status)"""


class Series:
    """The write side: one per shard process, the only writer of that shard's rows."""

    def __init__(self, segment: Segment, shard: int) -> None:
        layout = segment.layout
        self._words = segment.words
        self._start = layout.series_row(shard)
        self._histograms = layout.histogram(shard, 0, 0)
        self._full = layout.gauge(shard, at.G_SERIES_FULL)
        self._index = dict(_pairs(segment.cells, self._start))
        self._used = len(self._index)
        self._last_key, self._last_pair = -1, 0
        """most requests are counted where the one before was"""

    def count(self, route: int, model: int, code: int) -> None:
        """One more request of that route and model was answered with that status."""
        self._words.add(self._pair(route, model, code), 1)

    def observe(self, route: int, kind: int, seconds: float) -> None:
        """`kind` is one of layout.KIND_*."""
        self._words.observe(self._histograms + (route * _KINDS + kind) * _WORDS, seconds)

    def _pair(self, route: int, model: int, code: int) -> int:
        """The word that counts this series, new if need be; a full table counts the model as "other"."""
        key = (route << _ROUTE_SHIFT) | (model << _MODEL_SHIFT) | code
        if key == self._last_key:
            return self._last_pair
        known = self._index.get(key)
        if known is not None:
            self._last_key, self._last_pair = key, known
            return known
        limit = at.SERIES_SLOTS - (RESERVED_PAIRS if model else 0)
        if self._used >= limit:
            return self._pair_when_full(route, model, code)
        pair = self._start + 2 * self._used
        self._used += 1
        self._words.put(pair, key + 1)
        self._index[key] = pair + 1
        return pair + 1

    def _pair_when_full(self, route: int, model: int, code: int) -> int:
        if model == 0:
            return self._full  # even the reserve is gone: the request shows in series_full_total alone
        self._words.add(self._full, 1)
        return self._pair(route, 0, code)


def _pairs(cells: memoryview, start: int) -> Iterator[tuple[int, int]]:
    """(key, word that holds its count) of every pair in use, in the order of their first use."""
    for pair in range(start, start + at.SERIES_WORDS, 2):
        stored = cells[pair]
        if stored == 0:
            return
        yield stored - 1, pair + 1


def read_series(segment: Segment) -> dict[SeriesKey, int]:
    """Requests so far, added up over the shards."""
    totals: dict[SeriesKey, int] = {}
    for shard in range(segment.layout.shards):
        for key, word in _pairs(segment.cells, segment.layout.series_row(shard)):
            name = (key >> _ROUTE_SHIFT, (key >> _MODEL_SHIFT) & _MODEL_MASK, key & _CODE_MASK)
            totals[name] = totals.get(name, 0) + segment.cells[word]
    return totals


@dataclass(frozen=True, slots=True)
class Histogram:
    buckets: tuple[int, ...]
    """observations per bucket (not cumulative); one more than BUCKETS_S"""
    sum_s: float

    @property
    def count(self) -> int:
        """Of the buckets, not of the stored counter: a reader may see an observation half written."""
        return sum(self.buckets)


def read_histogram(segment: Segment, route: int, kind: int) -> Histogram:
    """Added up over the shards."""
    buckets = [0] * (len(BUCKETS_S) + 1)
    sum_us = 0
    for shard in range(segment.layout.shards):
        row = segment.layout.histogram(shard, route, kind)
        for index in range(len(buckets)):
            buckets[index] += segment.cells[row + index]
        sum_us += segment.cells[row + HISTOGRAM_SUM_US]
    return Histogram(tuple(buckets), sum_us / 1e6)
