"""Overload, and processes that die all the time: minutes of it with scripts/soak, a short form of each otherwise.

POINTSMAN_SOAK_MINUTES says how long each scenario runs.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.chaos import ChaosFleet, chaos
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import IS_STRICT, leeway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.load import LOST, Load, Sample, share, statuses
from tests.fakes.permits import assert_all_are_free, assert_none_is_held
from tests.fakes.processes import is_alive, resident_bytes, wait_gone, wait_until
from tests.fakes.traffic import completion, shards_of_connections

SOAK_S = 60 * float(os.environ.get("POINTSMAN_SOAK_MINUTES", "0"))
DEADLINE_S = 10.0
MIB = 2**20
pytestmark = pytest.mark.timeout(180 + 4 * SOAK_S)


def pause(seconds: float) -> None:
    """Let the load run: that long is what is measured."""
    threading.Event().wait(seconds)


# --- overload

SEQUENCES = 32
"""Requests that each of the two engines runs at once; a further one waits in the engine."""
TOKENS = 24
"""Take an engine 200 ms and more."""
PERMITS = 2 * SEQUENCES
SHED = {"admission": {"max_concurrent_requests": PERMITS, "queue_size": PERMITS // 2, "queue_timeout_s": 5}}


def wire(number: int) -> bytes:
    """Prompts of their own, so that no cache shortens the work."""
    return completion(f"request {number} {'and so on ' * 20}", max_tokens=TOKENS)


@pytest.fixture
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--preset", "h100-8b", "--max-sequences", str(SEQUENCES)) as running:
        yield [engine.url for engine in running]


def observed(gate: Gateway, seconds: float, **load: Any) -> tuple[Sequence[Sample], list[float]]:
    """Samples of the clients, and seconds from admission to end of what was answered, as the log has them."""
    gate.forget_log()
    with Load((gate.host, gate.port), wire, **load) as running:
        pause(seconds)
        samples = running.stop()
    gate.wait_until("all is logged", lambda: len(answered(gate)) >= statuses(samples)[200])
    return samples, answered(gate)


def answered(gate: Gateway) -> list[float]:
    lines = [line for line in tuple(gate.log) if line["event"] == "request" and line["status"] == 200]
    return [(line["total_ms"] - line["queue_ms"]) / 1000 for line in lines]


def goodput(samples: Sequence[Sample]) -> float:
    """Good answers a second, while requests were coming."""
    first, last = min(sample.sent for sample in samples), max(sample.sent for sample in samples)
    return sum(sample.status == 200 and sample.ended <= last for sample in samples) / (last - first)


@dataclass(frozen=True, slots=True)
class Round:
    """What one overload came to. Seconds are the 99th percentiles."""

    peak: float
    """Good answers a second with as many clients as permits."""
    goodput: float
    at_ease_s: float
    """From admission to end, at 0.8 of the peak."""
    admitted_s: float
    """The same, at three times the peak."""
    shed_s: float

    def is_in_time(self) -> bool:
        least, slower = (0.9, 2.0) if IS_STRICT else (0.7, 4.0)
        return (
            self.goodput >= least * self.peak
            and self.admitted_s <= slower * self.at_ease_s
            and self.shed_s < 0.02 * leeway()
        )


def overload(gate: Gateway) -> Round:
    """As many clients as permits, 0.8 of what that gives, three times what it gives."""
    ease_s, overload_s = max(5, min(SOAK_S / 4, 15)), max(10, min(SOAK_S, 60))
    full, _ = observed(gate, ease_s, clients=PERMITS)
    peak = goodput(full)
    _, at_ease = observed(gate, ease_s, per_s=0.8 * peak)
    samples, admitted = observed(gate, overload_s, per_s=3 * peak)
    seen = statuses(samples)
    assert set(seen) <= {200, 408, 429}
    assert seen[429] > len(samples) / (2 if IS_STRICT else 3)
    shed = share((sample.took_s for sample in samples if sample.status == 429), 0.99)
    print(f"\noffered {3 * peak:.0f}/s: {dict(seen)}")
    return Round(peak, goodput(samples), share(at_ease, 0.99), share(admitted, 0.99), shed)


@pytest.mark.alone
def test_overload_costs_those_who_are_shed_and_nobody_else(engines: list[str]) -> None:
    """Three times what the engines can do: they still do it, in their usual time, and the others hear at once."""
    with gateway_with({}, SHED, "--policy", "least_request", workers=engines) as (gate, _):
        pids = gate.pids("shard")
        started = time.monotonic()
        observed(gate, 2, clients=PERMITS)  # the first requests make connections and pages
        before = resident_bytes(pids)
        rounds: list[Round] = []
        is_enough = False
        while not is_enough:
            rounds.append(overload(gate))
            grown = resident_bytes(pids) - before
            print(f"{rounds[-1]}, memory {grown / MIB:+.1f} MiB")
            assert grown < 8 * MIB
            assert gate.pids("shard") == pids
            # other work on the machine may spoil a round, not most of them
            spoilt = sum(not each.is_in_time() for each in rounds)
            assert spoilt <= max(2, len(rounds) / 2), rounds
            is_enough = time.monotonic() - started >= SOAK_S and spoilt <= len(rounds) / 2
        gate.wait_until("no load", lambda: gate.in_flight() == 0, 2)
        assert_none_is_held(gate)


# --- processes that die


def rows(gate: Gateway) -> dict[str, dict[str, Any]]:
    """By name; empty while control does not answer."""
    try:
        return {row["name"]: row for row in gate.admin("GET", "/status", timeout_s=0.5)[1]["processes"]}
    except (OSError, HTTPException):
        return {}


def is_ready(gate: Gateway, name: str, but_not: int = 0) -> bool:
    row = rows(gate).get(name)
    return row is not None and row["state"] == "ready" and row["pid"] not in (0, but_not)


@pytest.fixture
def fleet() -> Iterator[ChaosFleet]:
    with (
        launch_engines(2, "--preset", "h100-8b") as engines,
        chaos([engine.url for engine in engines]) as running,
    ):
        yield running


LIMIT = 200
LIMITED = {"admission": {"max_concurrent_requests": LIMIT, "queue_size": 0}}


def has_answered(load: Load, count: int) -> bool:
    return len(load.samples) >= count


def streamed(number: int) -> bytes:
    return completion(f"stream {number}", max_tokens=8, stream=True)


class Deaths:
    """Who owned which connection when a shard was killed."""

    def __init__(self, gate: Gateway) -> None:
        self._gate = gate
        self._owners: dict[int, int] = {}
        """Process of each client port, as it was last seen."""
        self.victims: set[int] = set()

    def strike(self, name: str, number: signal.Signals) -> None:
        gate = self._gate
        gate.wait_until("both shards are ready", lambda: is_ready(gate, "shard-0") and is_ready(gate, "shard-1"))
        victim = rows(gate)[name]["pid"]
        self.note_owners()
        os.kill(victim, number)
        self.victims.add(victim)
        gate.wait_until(f"{name} is replaced", partial(is_ready, gate, name, victim), DEADLINE_S)
        assert not is_alive(victim)
        self.note_owners()

    def note_owners(self) -> None:
        self._owners |= shards_of_connections(self._gate.pids("shard"), self._gate.port)

    def was_survivors(self, sample: Sample) -> bool:
        owner = self._owners.get(sample.port)
        return owner is not None and owner not in self.victims


def test_shards_die_every_two_seconds(fleet: ChaosFleet) -> None:
    """Killed, stopped and crashed in turn: only what ran on them is lost, and nothing that they held."""
    with gateway_with({}, LIMITED, workers=fleet.urls) as (gate, _):
        deaths = Deaths(gate)
        started = time.monotonic()
        signals = cycle((signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP))
        with Load((gate.host, gate.port), streamed, per_s=150) as load:
            wait_until("the load runs", partial(has_answered, load, 100), DEADLINE_S)
            for turn in range(max(6, int(SOAK_S / 2))):
                began = time.monotonic()
                deaths.strike(f"shard-{turn % 2}", next(signals))
                pause(began + 2 - time.monotonic())  # the pace of the deaths
            deaths.note_owners()
            samples = load.stop()
        seen = statuses(samples)
        print(f"\n{len(deaths.victims)} deaths in {time.monotonic() - started:.0f} s: {dict(seen)}")
        assert set(seen) <= {200, LOST}, "an error of another kind"
        lost = [sample for sample in samples if sample.status == LOST]
        assert not any(map(deaths.was_survivors, lost)), "a request on another shard was lost"
        assert seen[200] > (0.8 if IS_STRICT else 0.5) * len(samples)
        gate.wait_until("no load", lambda: not any(worker["in_flight"] for worker in gate.workers()), 2)
        assert gate.in_flight() == 0
        assert_none_is_held(gate)
        status = gate.admin("GET", "/status")[1]
        assert sum(row["restarts"] for row in status["processes"]) == len(deaths.victims)
        print(f"mutex recovered {status['lock_recoveries']} times, timed out {status['lock_timeouts']} times")


def test_permits_of_shards_that_die_come_back(fleet: ChaosFleet) -> None:
    limited = {"admission": {"max_concurrent_requests": 16, "queue_size": 0}}
    with gateway_with({}, limited, workers=fleet.urls) as (gate, _):
        deaths = Deaths(gate)
        for turn, number in enumerate((signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV)):
            with Load((gate.host, gate.port), streamed, clients=12):
                gate.wait_until("requests run", lambda: gate.in_flight() > 6)
                deaths.strike(f"shard-{turn % 2}", number)
            assert_all_are_free(gate, fleet, 16)
            fleet.heal()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("per_s", "bound_s"), [(0, 1.0), (150, 3.0)], ids=["idle", "loaded"])
def test_control_dies_again_and_again(fleet: ChaosFleet, number: signal.Signals, per_s: float, bound_s: float) -> None:
    """Nobody who sends requests notices; the admin API is back soon after the death, or after the stop was noticed."""
    with gateway_with({}, LIMITED, workers=fleet.urls) as (gate, _), ending(gate, per_s) as samples:
        took: list[float] = []
        for _ in range(max(3, int(SOAK_S / 8))):
            gate.wait_until("control is ready", partial(is_ready, gate, "control"))
            pid = rows(gate)["control"]["pid"]
            os.kill(pid, number)
            if number is signal.SIGSTOP:
                gate.wait_log("process_stuck", pid=pid)
            took.append(wait_until("control is back", partial(is_ready, gate, "control", pid), DEADLINE_S))
    print(f"\n{number.name}, {per_s} requests/s: back after {', '.join(f'{each:.2f}' for each in took)} s")
    assert statistics.median(took) <= bound_s * leeway()
    assert set(statuses(samples)) <= {200}


@contextmanager
def ending(gate: Gateway, per_s: float) -> Iterator[list[Sample]]:
    """With that many requests a second, none if 0; the list has their samples when the block has ended."""
    samples: list[Sample] = []
    if not per_s:
        yield samples
        return
    with Load((gate.host, gate.port), streamed, per_s=per_s) as load:
        yield samples
        samples += load.stop()


def test_the_supervisor_is_killed_under_load(fleet: ChaosFleet, tmp_path: Path) -> None:
    """Its children are gone within a second, its sockets are free, and the next one starts on them."""
    port: list[str] = []
    took: list[float] = []
    for _ in range(max(2, int(SOAK_S / 8))):
        with gateway(*port, folder=tmp_path, workers=fleet.urls) as gate:
            port = ["--port", str(gate.port)]
            children = gate.children()
            assert len(children) == 3
            with Load((gate.host, gate.port), streamed, per_s=150) as load:
                wait_until("the load runs", partial(has_answered, load, 50), DEADLINE_S)
                gate.process.kill()
                gate.process.wait()
                took.append(wait_gone(children, 1.0))
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((gate.host, gate.port), timeout=1).close()
            assert set(statuses(load.samples)) <= {200, LOST}
    print(f"\nchildren gone after at most {max(took) * 1000:.0f} ms, {len(took)} times")
