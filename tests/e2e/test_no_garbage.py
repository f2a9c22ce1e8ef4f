"""A request leaves nothing behind that only the cycle collector could free: memory stays flat without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.chaos import ChaosFleet, Cut, How, Status, Trouble, chaos
from tests.fakes.introspection import introspection, look
from tests.fakes.live_profiles import gateway_with
from tests.fakes.load import Load
from tests.fakes.traffic import completion

REQUESTS = 400
CLIENTS = 16
OBJECTS_OF_A_CONNECTION = 20
"""Parser and protocol of a connection know each other; each client has one, as a rule."""

LIMITED = {"admission": {"max_concurrent_requests": 4, "queue_size": 100}}
SHEDDING = {"admission": {"max_concurrent_requests": 1, "queue_size": 0}}
NO_BREAKERS = {"breaker": {"enabled": False}}


@pytest.fixture(scope="module")
def fleet() -> Iterator[ChaosFleet]:
    with launch_engines(2) as engines, chaos([engine.url for engine in engines]) as running:
        yield running


@pytest.mark.parametrize(
    ("shared", "troubles", "body"),
    [
        ({}, (), completion()),
        (LIMITED, (), completion()),
        (SHEDDING, (), completion()),
        (NO_BREAKERS, (Trouble(Status(500), rate=0.5), Trouble(Cut(How.RESET), rate=0.5)), completion()),
        (NO_BREAKERS, (Trouble(Cut(How.FIN, after_events=2), rate=0.5),), completion(max_tokens=4, stream=True)),
    ],
    ids=["plain", "queued", "shed", "retried", "continued"],
)
def test_no_garbage(
    fleet: ChaosFleet, tmp_path: Path, shared: dict[str, Any], troubles: tuple[Trouble, ...], body: bytes
) -> None:
    profile = {"streamFailure": "continue", "retry": {"initial_backoff_ms": 1, "budget_ratio": 1}}
    with gateway_with(profile, shared, workers=fleet.urls, environment=introspection(tmp_path)) as (gate, _):
        pids = gate.pids("shard")
        for pid in pids:
            look(tmp_path, pid)
        for worker in fleet.workers:
            worker.suffers(*troubles)
        with Load((gate.host, gate.port), lambda _: body, clients=CLIENTS, total=REQUESTS) as load:
            samples = load.wait()
        fleet.heal()
        assert len(samples) == REQUESTS
        assert len({sample.port for sample in samples}) <= 2 * CLIENTS
        metrics = gate.metrics()
        assert bool(metrics["pointsman_retries_total"]) == bool(troubles)
        assert bool(metrics["pointsman_continued_streams_total"]) == (b'"stream"' in body)
        garbage = sum(look(tmp_path, pid).garbage for pid in pids)
        assert garbage <= 2 * CLIENTS * OBJECTS_OF_A_CONNECTION + REQUESTS / 10
