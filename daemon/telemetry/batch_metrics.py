"""Metrics of offline batches and their payload store: what the runner counts in shared memory.

Nothing where there is no runner.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

_GAUGES = (
    (at.B_RUNNING, "pointsman_batches_running", "Batches that are not done."),
    (at.B_IN_FLIGHT, "pointsman_batch_lines_in_flight", "Requests of batches under way."),
    (at.B_LIMIT, "pointsman_batch_concurrency_limit", "Requests of batches that may be under way now."),
    (at.B_PAUSED, "pointsman_batches_paused", "1 while a full disk or an absent store stops a batch."),
)
_TRANSFERS = (
    (at.B_KEYS_RETRIED, "pointsman_store_keys_retried", "Keys that were sent again to the payload store."),
    (at.B_KEYS_RECOVERED, "pointsman_store_keys_recovered", "Keys that failed first, and then went through."),
    (at.B_KEYS_EXHAUSTED, "pointsman_store_keys_exhausted", "Keys that were given up on when retries or time ran out."),
)
_RESULTS = (
    (at.B_SUCCEEDED, "succeeded"),
    (at.B_FAILED, "failed"),
    (at.B_UNRUN, "unrun"),
)


def collect(segment: Segment) -> Iterator[Metric]:
    if not segment.process(segment.layout.batches).started_ns:
        return
    for word, name, documentation in _GAUGES:
        yield GaugeMetricFamily(name, documentation, value=segment.batch_count(word))
    lines = CounterMetricFamily(
        "pointsman_batch_lines",
        "Lines of batches that are done, by result; unrun: cancelled, expired.",
        labels=("result",),
    )
    for word, result in _RESULTS:
        lines.add_metric((result,), segment.batch_count(word))
    yield lines
    yield CounterMetricFamily(
        "pointsman_batch_retries", "Further attempts at lines of batches.", value=segment.batch_count(at.B_RETRIES)
    )
    yield CounterMetricFamily(
        "pointsman_batch_results_lost",
        "Results that the payload store had and lost.",
        value=segment.batch_count(at.B_LOST),
    )
    yield from _transfers(segment)


def _transfers(segment: Segment) -> Iterator[Metric]:
    for word, name, documentation in _TRANSFERS:
        yield CounterMetricFamily(name, documentation, value=segment.batch_count(word))
    failures = CounterMetricFamily(
        "pointsman_store_failures",
        "Failures of keys by the payload store's code, every attempt counted; `pointsman store explain CODE`.",
        labels=("code",),
    )
    for code, count in sorted(segment.store_failures().read().items()):
        failures.add_metric((code,), count)
    yield failures
