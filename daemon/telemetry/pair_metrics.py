"""Metrics of prefill/decode pairs, from what shards have counted (`pair_counts`)."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry import pair_counts
from pointsman.daemon.telemetry.buckets import cumulative
from pointsman.daemon.telemetry.series import Histogram

_STAGES = {
    "prefill": ("pointsman_pair_prefill_seconds", "From the sending of a prefill leg to its first token."),
    "transfer": ("pointsman_pair_transfer_seconds", "From prefill's first token to decode's first byte."),
}


def collect(segment: Segment, workers: tuple[WorkerSpec, ...]) -> Iterator[Metric]:
    requests = CounterMetricFamily("pointsman_pair_requests", "Legs of pairs that were sent.", labels=("leg",))
    for leg, count in pair_counts.requests(segment).items():
        requests.add_metric((leg,), count)
    errors = CounterMetricFamily("pointsman_pair_errors", "Legs that failed, by cause.", labels=("leg", "cause"))
    for labels, count in pair_counts.errors(segment).items():
        errors.add_metric(labels, count)
    events = CounterMetricFamily("pointsman_pair_events", "What else became of pairs, see docs.", labels=("event",))
    for event, count in pair_counts.events(segment).items():
        events.add_metric((event,), count)
    holds = GaugeMetricFamily(
        "pointsman_worker_holds", "Requests whose KV decode has yet to fetch from the worker.", labels=("worker",)
    )
    for worker in workers:
        if worker.role == "prefill":
            holds.add_metric((worker.url,), max(segment.holds(worker.slot), 0))
    yield from (requests, errors, events, holds)
    for stage, (name, documentation) in _STAGES.items():
        yield _histogram(name, documentation, pair_counts.seconds(segment, stage))


def _histogram(name: str, documentation: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, documentation)
    family.add_metric((), cumulative(histogram), sum_value=histogram.sum_s)
    return family
