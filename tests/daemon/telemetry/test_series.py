"""Counters of shards in shared memory: exact, bounded, and they outlive the shard."""

from __future__ import annotations

import subprocess
import sys
import timeit

import pytest

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry import series
from pointsman.daemon.telemetry.series import RESERVED_PAIRS, ROUTES, Series, read_histogram, read_series

CHAT = ROUTES.index("/v1/chat/completions")


@pytest.fixture
def segment() -> Segment:
    return Segment.create(2, 4)


def test_counts_of_all_shards_add_up(segment: Segment) -> None:
    one, other = Series(segment, 0), Series(segment, 1)
    for _ in range(3):
        one.count(CHAT, 1, 200)
    other.count(CHAT, 1, 200)
    other.count(0, 0, 404)
    assert read_series(segment) == {(CHAT, 1, 200): 4, (0, 0, 404): 1}


def test_keys_do_not_run_into_each_other(segment: Segment) -> None:
    written = Series(segment, 0)
    keys = [(0, 0, 0), (0, 0, 599), (0, 1, 0), (1, 0, 0), (63, 0, 0), (0, 1 << 16, 200), (1, 1, 200), (63, 99_999, 599)]
    for repeat, key in enumerate(keys, 1):
        for _ in range(repeat):
            written.count(*key)
    assert read_series(segment) == {key: repeat for repeat, key in enumerate(keys, 1)}


def test_a_respawned_shard_counts_on(segment: Segment) -> None:
    first = Series(segment, 1)
    first.count(CHAT, 0, 200)
    first.count(CHAT, 0, 500)
    successor = Series(Segment.attach(segment.fd), 1)
    successor.count(CHAT, 0, 500)
    successor.count(CHAT, 0, 502)
    assert read_series(segment) == {(CHAT, 0, 200): 1, (CHAT, 0, 500): 2, (CHAT, 0, 502): 1}


def test_a_key_without_its_count_reads_as_zero(segment: Segment) -> None:
    """What a shard that died between the two stores leaves behind."""
    first = Series(segment, 0)
    first.count(CHAT, 0, 200)
    first.count(CHAT, 0, 500)
    segment.cells[segment.layout.series_row(0) + 3] = 0
    assert read_series(segment) == {(CHAT, 0, 200): 1, (CHAT, 0, 500): 0}
    successor = Series(segment, 0)
    successor.count(CHAT, 0, 500)
    assert read_series(segment)[CHAT, 0, 500] == 1


def test_a_full_table_loses_models_but_no_request(segment: Segment) -> None:
    written = Series(segment, 0)
    models = at.SERIES_SLOTS + 10
    for model in range(1, models + 1):
        written.count(CHAT, model, 200)
    counts = read_series(segment)
    excess = models - (at.SERIES_SLOTS - RESERVED_PAIRS)
    assert sum(counts.values()) == models
    assert counts[CHAT, 0, 200] == excess
    assert segment.gauge(0, at.G_SERIES_FULL) == excess
    written.count(CHAT, 1, 200)
    assert read_series(segment)[CHAT, 1, 200] == 2


def test_past_the_last_pair_only_the_overflow_counts(segment: Segment) -> None:
    written = Series(segment, 0)
    for code in range(at.SERIES_SLOTS + 5):
        written.count(CHAT, 0, code)
    assert len(read_series(segment)) == at.SERIES_SLOTS
    assert segment.gauge(0, at.G_SERIES_FULL) == 5
    assert read_series(Segment.attach(segment.fd))[CHAT, 0, 0] == 1
    gauges_end = segment.layout.series_row(1)
    assert segment.cells[gauges_end] == 0, "the next shard's row is untouched"


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (0.001, 0), (0.0011, 1), (1.0, 9), (7200.0, 20), (7200.1, 21), (1e6, 21)]
)
def test_a_bucket_holds_what_is_at_most_its_bound(segment: Segment, seconds: float, bucket: int) -> None:
    Series(segment, 0).observe(CHAT, at.KIND_DURATION, seconds)
    histogram = read_histogram(segment, CHAT, at.KIND_DURATION)
    assert histogram.buckets[bucket] == histogram.count == 1
    assert histogram.sum_s == pytest.approx(seconds, abs=1e-6)


def test_histograms_of_routes_kinds_and_shards_are_apart(segment: Segment) -> None:
    Series(segment, 0).observe(CHAT, at.KIND_DURATION, 1.5)
    Series(segment, 1).observe(CHAT, at.KIND_DURATION, 0.25)
    Series(segment, 1).observe(CHAT, at.KIND_FIRST_BYTE, 0.1)
    Series(segment, 1).observe(len(ROUTES) - 1, at.KIND_FIRST_BYTE, 0.1)
    duration = read_histogram(segment, CHAT, at.KIND_DURATION)
    assert (duration.count, duration.sum_s) == (2, 1.75)
    assert read_histogram(segment, CHAT, at.KIND_FIRST_BYTE).count == 1
    assert read_histogram(segment, CHAT + 1, at.KIND_DURATION).count == 0


def test_the_constants_fit_the_layout() -> None:
    assert ROUTES[0] == "other"
    assert len(set(ROUTES)) == len(ROUTES) <= at.HISTOGRAM_ROUTES
    assert len(at.BUCKETS_S) < at.HISTOGRAM_COUNT < at.HISTOGRAM_SUM_US < at.HISTOGRAM_WORDS


def test_the_request_path_imports_nothing_heavy() -> None:
    heavy = "{'prometheus_client', 'aiohttp', 'pydantic', 'msgspec'}"
    code = f"import sys, {series.__name__}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=90)


def test_counting_is_cheap(segment: Segment) -> None:
    """0.2 and 0.4 µs where this was written; the bounds leave room for a slow machine, not for another design."""
    written = Series(segment, 0)
    runs = 20_000
    count = min(timeit.repeat(lambda: written.count(CHAT, 3, 200), number=runs, repeat=5)) / runs
    observe = min(timeit.repeat(lambda: written.observe(CHAT, 0, 0.0123), number=runs, repeat=5)) / runs
    assert count < 2e-6
    assert observe < 3e-6
