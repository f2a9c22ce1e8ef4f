"""What resilience tells a scrape."""

from __future__ import annotations

import pytest
from prometheus_client.core import Metric

from pointsman.config.snapshot import Shared, Snapshot, WorkerSpec
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.resilience.breaker import Verdict
from pointsman.daemon.resilience.timeouts import DEADLINES, Deadline
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.resilience_metrics import collect

WORKERS = tuple(
    WorkerSpec(id=f"w{slot}", url=f"http://w{slot}", slot=slot, address="127.0.0.1", host="x", port=1)
    for slot in range(2)
)


@pytest.fixture
def state() -> RoutingState:
    return RoutingState.create(Segment.create(2, 4), IndexSize(2, 512), 2**20)


def scrape(state: RoutingState, shared: Shared = Shared()) -> dict[str, Metric]:  # noqa: B008 - it is frozen
    return {metric.name: metric for metric in collect(state, Snapshot(1, workers=WORKERS, shared=shared))}


def values(metric: Metric) -> dict[str, float]:
    return {next(iter(sample.labels.values()), ""): sample.value for sample in metric.samples}


def test_counters_of_all_shards_are_one(state: RoutingState) -> None:
    for shard in range(2):
        for word, count in ((at.G_RETRIES, 3), (at.G_RATE_LIMITED, 2), (at.G_BREAKER_REFUSED, 1)):
            state.segment.cells[state.segment.layout.gauge(shard, word)] = count
        word = at.G_TIMEOUTS + DEADLINES.index(Deadline.IDLE)
        state.segment.cells[state.segment.layout.gauge(shard, word)] = 5
    found = scrape(state)
    assert values(found["pointsman_retries"]) == {"": 6}
    refused = values(found["pointsman_requests_refused"])
    assert refused == {"queue_full": 0, "queue_timeout": 0, "rate": 4, "breaker": 2}
    assert values(found["pointsman_timeouts"])["idle"] == 10
    assert len(found["pointsman_timeouts"].samples) == len(Deadline)


def test_an_open_breaker(state: RoutingState) -> None:
    shared = Shared(breaker={"failure_threshold": 2})
    resilience = SharedResilience(state, 0).follow(shared)
    for _ in range(2):
        resilience.record(1, resilience.acquire(1, 7.0) or 0, Verdict.FAILURE, 1e12)
    found = scrape(state, shared)
    assert values(found["pointsman_worker_breaker_state"]) == {"http://w0": 0, "http://w1": 1}
    assert values(found["pointsman_worker_breaker_openings"]) == {"http://w0": 0, "http://w1": 1}


def test_admission(state: RoutingState) -> None:
    SharedResilience(state, 1).enter_freely()
    found = scrape(state, Shared(admission={"max_concurrent_requests": 9}))
    assert values(found["pointsman_admission_in_use"]) == {"": 1}
    assert values(found["pointsman_admission_limit"]) == {"": 9}


def test_a_full_budget(state: RoutingState) -> None:
    assert values(scrape(state)["pointsman_retry_budget"]) == {"": 100}
