"""GET /metrics: the whole daemon in one scrape, read from shared memory at the moment of the question.

The names below are public: a rename breaks somebody's alerts (tests hold the list). Series of a worker end with the
worker; requests for models that no worker serves are one series, "other".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pointsman.config.snapshot import KEY_OTHER, MODEL_OTHER, Snapshot, WorkerSpec
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry import batch_metrics, pair_metrics, peer_metrics, resilience_metrics, routing_metrics
from pointsman.daemon.telemetry.buckets import cumulative
from pointsman.daemon.telemetry.key_counts import read_key_counts
from pointsman.daemon.telemetry.series import ROUTES, read_histogram, read_series

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HEARTBEAT_STALE_NS = 2_000_000_000
"""as the supervisor judges"""


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """What is not in shared memory. Times are Unix seconds."""

    version: str
    started_at: float
    last_reload_ok: bool
    last_reload_success_at: float
    """when the configuration in force was published"""


def render(state: RoutingState, snapshot: Snapshot, info: DaemonInfo, compat: str = "none") -> bytes:
    """Prometheus text format 0.0.4 (`CONTENT_TYPE`). `compat`: whose names the page has, too (`peer_metrics`)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SegmentCollector(state, snapshot, info, compat))
    return generate_latest(registry)


class _SegmentCollector(Collector):
    def __init__(self, state: RoutingState, snapshot: Snapshot, info: DaemonInfo, compat: str) -> None:
        self._state = state
        self._segment = state.segment
        self._snapshot = snapshot
        self._info = info
        self._compat = compat

    def collect(self) -> Iterator[Metric]:
        own = list(self._own())
        yield from own
        yield from peer_metrics.collect(own, self._compat, self._snapshot.workers)

    def _own(self) -> Iterator[Metric]:
        yield from _requests(self._segment, self._snapshot.models)
        yield from _keys(self._segment, self._snapshot)
        yield from _workers(self._segment, self._snapshot.workers)
        yield from _shards(self._segment)
        yield from _totals(self._segment)
        yield from routing_metrics.collect(self._state, self._snapshot.workers)
        yield from resilience_metrics.collect(self._state, self._snapshot)
        yield from batch_metrics.collect(self._segment)
        yield from pair_metrics.collect(self._segment, self._snapshot.workers)
        yield from _daemon(self._segment, self._info)


# --- requests


def _requests(segment: Segment, models: tuple[str, ...]) -> Iterator[Metric]:
    counts = CounterMetricFamily(
        "pointsman_requests", "Answered requests by route, model and status.", labels=("route", "model", "code")
    )
    for labels, count in sorted(_labelled(segment, models).items()):
        counts.add_metric(labels, count)
    yield counts
    yield _histogram(
        segment, at.KIND_DURATION, "pointsman_request_duration_seconds", "From a request's arrival to its answer's end."
    )
    yield _histogram(
        segment,
        at.KIND_FIRST_BYTE,
        "pointsman_time_to_first_byte_seconds",
        "From a request's arrival to the first byte of the worker's answer.",
    )


def _labelled(segment: Segment, models: tuple[str, ...]) -> dict[tuple[str, str, str], int]:
    """A shard may be a generation ahead of `models`: what has no name here yet is added to "other"."""
    counts: dict[tuple[str, str, str], int] = {}
    for (route, model, code), count in read_series(segment).items():
        name = models[model] if model < len(models) else MODEL_OTHER
        labels = (ROUTES[route], name, str(code))
        counts[labels] = counts.get(labels, 0) + count
    return counts


def _histogram(segment: Segment, kind: int, name: str, documentation: str) -> Metric:
    """Of the routes that were used."""
    metric = HistogramMetricFamily(name, documentation, labels=("route",))
    for route, label in enumerate(ROUTES):
        histogram = read_histogram(segment, route, kind)
        if histogram.count:
            metric.add_metric((label,), buckets=cumulative(histogram), sum_value=histogram.sum_s)
    return metric


# --- API keys


def _keys(segment: Segment, snapshot: Snapshot) -> Iterator[Metric]:
    """By the keys' names; those that are too many for names of their own together as "other"."""
    if snapshot.keys is None:
        return
    requests = CounterMetricFamily(
        "pointsman_key_requests", "Answered requests by API key and class of status.", labels=("key", "class")
    )
    tokens = CounterMetricFamily(
        "pointsman_key_tokens", "Tokens of prompts and of answers by API key.", labels=("key", "kind")
    )
    names = {key.name for key in snapshot.keys}
    for label, name in enumerate(snapshot.key_names):
        counts = read_key_counts(segment, label)
        if name in names or (name == KEY_OTHER and any(counts)):
            good, client_errors, server_errors, prompt, output = counts
            for kind, count in (("ok", good), ("4xx", client_errors), ("5xx", server_errors)):
                requests.add_metric((name or "other", kind), count)
            for kind, count in (("prompt", prompt), ("output", output)):
                tokens.add_metric((name or "other", kind), count)
    yield from (requests, tokens)


# --- workers


def _workers(segment: Segment, workers: Iterable[WorkerSpec]) -> Iterator[Metric]:
    by_worker = ("worker",)
    up = GaugeMetricFamily("pointsman_worker_up", "1 while the worker may be picked.", labels=by_worker)
    weight = GaugeMetricFamily("pointsman_worker_weight", "Share of requests, relative to others.", labels=by_worker)
    in_flight = GaugeMetricFamily("pointsman_worker_in_flight", "Requests on the worker now.", labels=by_worker)
    size = GaugeMetricFamily(
        "pointsman_worker_in_flight_bytes", "Request bodies of those in flight, in bytes.", labels=by_worker
    )
    picks = CounterMetricFamily("pointsman_worker_picks", "Times the worker was chosen.", labels=by_worker)
    refused = CounterMetricFamily(
        "pointsman_worker_connect_failures", "Connections to the worker that could not be made.", labels=by_worker
    )
    failed = CounterMetricFamily(
        "pointsman_worker_failures", "Requests that the worker broke off or did not answer in time.", labels=by_worker
    )
    for worker in workers:
        label = (worker.url,)
        up.add_metric(label, segment.status(worker.slot) == at.STATUS_UP)
        weight.add_metric(label, worker.weight)
        in_flight.add_metric(label, max(0, segment.total(worker.slot, at.L_INFLIGHT)))
        size.add_metric(label, max(0, segment.total(worker.slot, at.L_INFLIGHT_BYTES)))
        picks.add_metric(label, segment.total(worker.slot, at.L_PICKS))
        refused.add_metric(label, segment.total(worker.slot, at.L_CONNECT_FAILURES))
        failed.add_metric(label, segment.total(worker.slot, at.L_FAILURES))
    yield from (up, weight, in_flight, size, picks, refused, failed)


# --- shards


def _shards(segment: Segment) -> Iterator[Metric]:
    up = GaugeMetricFamily("pointsman_shard_up", "1 while the shard serves and its heart beats.", labels=("shard",))
    restarts = CounterMetricFamily("pointsman_shard_restarts", "Times the shard was started again.", labels=("shard",))
    now_ns = time.monotonic_ns()
    for shard in range(segment.layout.shards):
        row = segment.process(shard)
        serves = row.state in (at.PROCESS_READY, at.PROCESS_DRAINING)
        up.add_metric((str(shard),), serves and now_ns - row.heartbeat_ns < HEARTBEAT_STALE_NS)
        restarts.add_metric((str(shard),), row.restarts)
    yield from (up, restarts)


_GAUGES = (
    (at.G_CONNECTIONS, "pointsman_connections", "Client connections that are open."),
    (at.G_REQUESTS, "pointsman_requests_in_flight", "Requests that are being received or answered."),
    (at.G_HELD, "pointsman_paused_requests", "Requests that wait for the end of a pause."),
    (at.G_BUFFERED_BYTES, "pointsman_buffered_bytes", "Request bodies held in memory, in bytes."),
    (at.G_UPSTREAM_CONNECTIONS, "pointsman_upstream_connections", "Connections to workers that are open."),
)
_COUNTERS = (
    (at.G_LOG_DROPPED, "pointsman_access_log_dropped", "Access log lines lost because their reader stalled."),
    (at.G_CLIENT_DISCONNECTS, "pointsman_client_disconnects", "Requests whose client left before the answer's end."),
    (at.G_UPSTREAM_RESENDS, "pointsman_upstream_resends", "Requests sent again: the kept connection was closed."),
    (at.G_PROFILE_FALLBACKS, "pointsman_profile_fallbacks", "Requests that named a profile which does not exist."),
    (at.G_STREAM_ROUNDS, "pointsman_stream_rounds", "Looks at all streams, while events were too many for one each."),
    (at.G_SERIES_FULL, "pointsman_series_full", "Requests counted under another model: the table is full."),
)


def _totals(segment: Segment) -> Iterator[Metric]:
    for word, name, documentation in _GAUGES:
        yield GaugeMetricFamily(name, documentation, value=max(0, segment.gauge_total(word)))
    for word, name, documentation in _COUNTERS:
        yield CounterMetricFamily(name, documentation, value=segment.gauge_total(word))
    yield CounterMetricFamily(
        "pointsman_lock_waits", "Times the routing lock was asked for while it was held.", value=segment.lock_waits
    )
    yield CounterMetricFamily(
        "pointsman_lock_timeouts", "Picks made without the routing lock.", value=segment.lock_timeouts
    )
    yield CounterMetricFamily(
        "pointsman_lock_recoveries", "Times the routing lock's holder had died.", value=segment.lock_recoveries
    )


# --- the daemon


def _daemon(segment: Segment, info: DaemonInfo) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "pointsman_config_generation", "Number of the configuration in force.", value=segment.generation
    )
    yield GaugeMetricFamily(
        "pointsman_config_last_reload_successful", "1 if the last reload was accepted.", value=info.last_reload_ok
    )
    yield GaugeMetricFamily(
        "pointsman_config_last_reload_success_timestamp_seconds",
        "When the configuration in force was published.",
        value=info.last_reload_success_at,
    )
    yield GaugeMetricFamily("pointsman_start_time_seconds", "When the daemon was started.", value=info.started_at)
    build = GaugeMetricFamily("pointsman_build_info", "Always 1.", labels=("version",))
    build.add_metric((info.version,), 1)
    yield build
