"""What resilience has to tell a scrape: retries and their budget, breakers, admission, deadlines that were missed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pointsman.config.resilience import RetrySection
from pointsman.config.snapshot import Snapshot
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.resilience.timeouts import DEADLINES
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import RoutingState

_COUNTERS = (
    (at.G_RETRIES, "pointsman_retries", "Attempts after the first one."),
    (at.G_RETRIES_EXHAUSTED, "pointsman_retries_exhausted", "Requests that failed after all attempts they may have."),
    (at.G_CONTINUATIONS, "pointsman_continued_streams", "Broken streams that another attempt went on with."),
    (at.G_BUDGET_EMPTY, "pointsman_retry_budget_exhausted", "Retries that were not made: the budget was empty."),
)
_REFUSED = (
    (at.G_QUEUE_FULL, "queue_full"),
    (at.G_QUEUE_TIMEOUT, "queue_timeout"),
    (at.G_RATE_LIMITED, "rate"),
    (at.G_BREAKER_REFUSED, "breaker"),
)


def collect(state: RoutingState, snapshot: Snapshot) -> Iterator[Metric]:
    segment, now = state.segment, time.monotonic()
    resilience = SharedResilience(state, -1).follow(snapshot.shared)
    for word, name, documentation in _COUNTERS:
        yield CounterMetricFamily(name, documentation, value=segment.gauge_total(word))
    balance = resilience.balance(msgspec.convert(snapshot.default_retry, RetrySection), now)
    yield GaugeMetricFamily("pointsman_retry_budget", "Retries that could be made now.", value=balance)
    refused = CounterMetricFamily(
        "pointsman_requests_refused", "Requests answered without an attempt, by reason.", labels=("reason",)
    )
    for word, reason in _REFUSED:
        refused.add_metric((reason,), segment.gauge_total(word))
    yield refused
    missed = CounterMetricFamily("pointsman_timeouts", "Deadlines that were missed.", labels=("deadline",))
    for position, deadline in enumerate(DEADLINES):
        missed.add_metric((deadline.value,), segment.gauge_total(at.G_TIMEOUTS + position))
    yield missed
    usage = resilience.usage()
    yield GaugeMetricFamily("pointsman_admission_in_use", "Requests admitted and not ended.", value=usage.in_use)
    yield GaugeMetricFamily("pointsman_admission_waiting", "Requests that wait for admission.", value=usage.waiting)
    limit = resilience.admission.max_concurrent_requests
    yield GaugeMetricFamily("pointsman_admission_limit", "Requests admitted at once; 0 = no limit.", value=limit)
    is_paused = state.segment.cells[at.H_PAUSE] != 0
    yield GaugeMetricFamily("pointsman_paused", "1 while no request may start at a worker.", value=is_paused)
    yield from _breakers(resilience, snapshot, now)


def _breakers(resilience: SharedResilience, snapshot: Snapshot, now: float) -> Iterator[Metric]:
    by_worker = ("worker",)
    states = GaugeMetricFamily(
        "pointsman_worker_breaker_state", "0 closed, 1 open, 2 half-open: one probe at a time.", labels=by_worker
    )
    openings = CounterMetricFamily(
        "pointsman_worker_breaker_openings", "Times the worker's breaker opened.", labels=by_worker
    )
    for worker in snapshot.workers:
        view = resilience.view(worker.slot, now)
        states.add_metric((worker.url,), view.state)
        openings.add_metric((worker.url,), view.openings)
    yield from (states, openings)
