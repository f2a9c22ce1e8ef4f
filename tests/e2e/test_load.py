"""Many requests: every one is answered, the slow worker gets fewer, and afterwards nobody is charged for anything."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.traffic import Failure, Traffic, completion, shards_of_connections

REQUESTS = 20_000
KILLS = 10
SLOW = json.dumps({"kind": "latency", "ms": 100})


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    """Four workers; the last one answers 100 ms later than the others."""
    with launch_engines(3) as quick, launch_engines(1, "--fault", SLOW) as slow:
        yield [engine.url for engine in (*quick, *slow)]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway("--policy", "least_request", workers=engines) as running:
        yield running


def assert_nothing_in_flight(gate: Gateway) -> None:
    gate.wait_until("the clients' connections are closed", lambda: gate.admin("GET", "/status")[1]["connections"] == 0)
    gate.wait_until("nothing in flight", lambda: gate.in_flight() == 0, timeout_s=2)
    cells = [(worker["in_flight"], worker["in_flight_bytes"]) for worker in gate.workers()]
    assert cells == [(0, 0)] * len(cells)
    assert gate.admin("GET", "/status")[1]["buffered_bytes"] == 0
    gauges = {name: value for name, value in gate.metrics().items() if "in_flight" in name or "buffered" in name}
    assert len(gauges) == 2 * len(cells) + 2
    assert not any(gauges.values()), gauges


def shard_pids(gate: Gateway) -> list[int]:
    """Of all shards, once all of them are ready."""

    def ready() -> list[int]:
        rows = [row for row in gate.admin("GET", "/status")[1]["processes"] if row["name"].startswith("shard")]
        return [row["pid"] for row in rows] if all(row["state"] == "ready" for row in rows) else []

    return gate.wait_until("all shards are ready", ready)


def restarts(gate: Gateway) -> int:
    processes = gate.admin("GET", "/status")[1]["processes"]
    return sum(row["restarts"] for row in processes if row["name"].startswith("shard"))


@pytest.mark.slow
def test_no_error_and_the_slow_worker_gets_fewer(gate: Gateway) -> None:
    started = time.monotonic()
    with Traffic((gate.host, gate.port), completion(), connections=48, total=REQUESTS) as traffic:
        pids = shard_pids(gate)
        gate.wait_until(
            "both shards have connections",
            lambda: set(shards_of_connections(pids, gate.port).values()) == set(pids),
        )
        report = traffic.wait()
    print(f"\n{REQUESTS} requests in {time.monotonic() - started:.1f} s")
    assert report.failures == []
    assert report.answered == REQUESTS
    picks = [worker["picks"] for worker in gate.workers()]
    assert sum(picks) == REQUESTS
    assert picks[3] < min(picks[:3]), picks
    assert report.by_worker == {worker["id"]: worker["picks"] for worker in gate.workers()}
    assert_nothing_in_flight(gate)


@pytest.mark.slow
def test_a_killed_shard_fails_only_what_runs_on_it(gate: Gateway) -> None:
    before = restarts(gate)
    deaths: list[tuple[float, set[int]]] = []
    with Traffic((gate.host, gate.port), completion(), connections=32) as traffic:
        for turn in range(KILLS):
            began = time.monotonic()
            pids = shard_pids(gate)
            victim = pids[turn % len(pids)]
            owners = settled_owners(gate, traffic, pids)
            deaths.append((time.monotonic(), {port for port, pid in owners.items() if pid == victim}))
            os.kill(victim, signal.SIGKILL)
            time.sleep(max(0.0, began + 1.0 - time.monotonic()))  # the pace of the kills, nothing waits for it
        report = traffic.stop()
    assert restarts(gate) - before == KILLS
    metrics = gate.metrics()
    assert sum(metrics[f'pointsman_shard_restarts_total{{shard="{n}"}}'] for n in (0, 1)) == before + KILLS
    print(f"\n{report.answered} answered, {len(report.failures)} failed with {KILLS} shards killed")
    assert report.answered > 1000
    for failure in report.failures:
        assert_was_on_the_victim(failure, deaths)
    assert_nothing_in_flight(gate)


def settled_owners(gate: Gateway, traffic: Traffic, pids: list[int]) -> dict[int, int]:
    """Client port -> shard, once every client has a connection that a shard has accepted."""

    def all_owned() -> dict[int, int]:
        owners = shards_of_connections(pids, gate.port)
        ports = traffic.ports()
        return owners if len(ports) == 32 and ports <= owners.keys() and set(owners.values()) == set(pids) else {}

    return gate.wait_until("every connection is accepted, on both shards", all_owned)


def assert_was_on_the_victim(failure: Failure, deaths: list[tuple[float, set[int]]]) -> None:
    """A broken connection of the shard that was killed last before it; never an answer with an error."""
    _, ports = max(death for death in deaths if death[0] <= failure.at)
    assert failure.what.startswith("connection lost"), failure
    assert failure.port in ports, failure
