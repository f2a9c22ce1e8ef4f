"""Clients that leave free the worker at once, wherever their request is, and nothing of them stays."""

from __future__ import annotations

import asyncio
import math
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.answers import read_answer
from tests.fakes.chaos import ChaosFleet, Cut, How, Status, chaos
from tests.fakes.gateway import Gateway
from tests.fakes.introspection import introspection, look
from tests.fakes.leeway import leeway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.load import share
from tests.fakes.permits import assert_all_are_free, assert_none_is_held, named
from tests.fakes.processes import open_files, wait_until
from tests.fakes.traffic import Client, client_of_each

CLIENTS = 1000
AT_ONCE = 40
PLACES = 20
PERMITS = 64
WHERE = ("request", "waiting", "streaming", "body")
TIMEOUT_S = 40.0
BACKOFF_MS = 300
DEFAULT = {"retry": {"initial_backoff_ms": BACKOFF_MS, "jitter_factor": 0}}
SHARED = {"admission": {"max_concurrent_requests": PERMITS, "queue_size": 0}, "breaker": {"enabled": False}}
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def fleet() -> Iterator[ChaosFleet]:
    with launch_engines(2) as engines, chaos([engine.url for engine in engines]) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inside")


@pytest.fixture(scope="module")
def gate(fleet: ChaosFleet, folder: Path) -> Iterator[Gateway]:
    inside = introspection(folder)
    with gateway_with(DEFAULT, SHARED, "--pool-max-idle", "0", workers=fleet.urls, environment=inside) as (running, _):
        yield running


@pytest.fixture(autouse=True)
def healed(fleet: ChaosFleet) -> Iterator[None]:
    yield
    fleet.heal()


@dataclass(frozen=True, slots=True)
class Held:
    """What the shards hold when nobody asks them for anything."""

    files: dict[int, int]
    tasks: dict[int, int]


def held(gate: Gateway, folder: Path) -> Held:
    pids = gate.pids("shard")
    return Held({pid: len(open_files(pid)) for pid in pids}, {pid: look(folder, pid).tasks for pid in pids})


def assert_nothing_stays(gate: Gateway, before: Held, folder: Path) -> None:
    gate.wait_until("no load", lambda: gate.in_flight() == 0, 2)
    assert [(worker["in_flight"], worker["in_flight_bytes"]) for worker in gate.workers()] == [(0, 0)] * 2
    assert_none_is_held(gate)
    gate.wait_until("no connection", lambda: gate.admin("GET", "/status")[1]["connections"] == 0, 2)
    assert gate.admin("GET", "/status")[1]["buffered_bytes"] == 0
    gate.wait_until("no file and no task more than before", lambda: held(gate, folder) == before, 5)


# --- anywhere


class Leaver:
    """One client; it leaves after so many bytes of its request, or of its answer, or after a while without any."""

    def __init__(self, number: int, fleet: ChaosFleet) -> None:
        self._rng = random.Random(number)
        self._fleet = fleet
        self.request_id = f"leaver-{number}"
        self.left_at = math.inf
        self.where = WHERE[number % len(WHERE)]
        self.is_patient = number % (2 * len(WHERE)) < len(WHERE)

    async def come_and_go(self, address: tuple[str, int]) -> None:
        is_stream = self.where == "streaming" or self._rng.random() < 0.5
        wire = named(self.request_id, stream=is_stream and self.where != "body")
        reader, writer = await asyncio.open_connection(*address)
        match self.where:
            case "request":
                writer.write(wire[: self._rng.randrange(len(wire))])
                await writer.drain()
            case "waiting":
                self._fleet.plan(self.request_id, Cut(How.HANG))
                writer.write(wire)
                # the moment at which it leaves: any, or when its worker has the request for certain
                await asyncio.sleep(self._rng.random() * 0.05)
                while self.is_patient and not self._fleet.attempts_of(self.request_id):  # noqa: ASYNC110 - in a thread
                    await asyncio.sleep(0.02)
            case "streaming":
                self._fleet.plan(self.request_id, Cut(How.HANG, after_events=3))
                writer.write(wire)
                await reader.readexactly(self._rng.randrange(1, 600))
            case "body":
                self._fleet.plan(self.request_id, Cut(How.HANG, after_bytes=300))
                writer.write(wire)
                await reader.readexactly(self._rng.randrange(1, 300))
        if self._rng.random() < 0.5:
            sock = cast("socket.socket", writer.get_extra_info("socket"))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.left_at = time.monotonic()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    def freed_after_s(self) -> list[float]:
        """How long its workers were held for nobody; a request may have been on its way when the client left."""
        attempts = self._fleet.attempts_of(self.request_id)
        return [max(attempt.closed_at - max(self.left_at, attempt.at), 0.0) for attempt in attempts]


async def all_come_and_go(leavers: list[Leaver], address: tuple[str, int]) -> None:
    turnstile = asyncio.Semaphore(AT_ONCE)

    async def come(leaver: Leaver) -> None:
        async with turnstile:
            await asyncio.wait_for(leaver.come_and_go(address), TIMEOUT_S)

    await asyncio.gather(*map(come, leavers))


def test_a_thousand_clients_leave(gate: Gateway, fleet: ChaosFleet, folder: Path) -> None:
    with Client((gate.host, gate.port)) as client:
        client.sock.sendall(named("warm-up"))
        assert read_answer(client).status == 200
    gate.wait_until("nobody is there", lambda: gate.admin("GET", "/status")[1]["connections"] == 0)
    before = held(gate, folder)
    fleet.attempts.clear()
    leavers = [Leaver(number, fleet) for number in range(CLIENTS)]
    asyncio.run(all_come_and_go(leavers, (gate.host, gate.port)))

    gate.wait_until("no load", lambda: gate.in_flight() == 0, 2)
    wait_until("all are closed", lambda: all(a.closed_at < math.inf for a in tuple(fleet.attempts)), 2)
    freed: dict[str, list[float]] = {where: [] for where in WHERE}
    for leaver in leavers:
        freed[leaver.where] += leaver.freed_after_s()
    assert freed["request"] == [], "a request that was never complete reached a worker"
    assert len(freed["streaming"]) == len(freed["body"]) == CLIENTS / 4
    assert len(freed["waiting"]) >= CLIENTS / 8
    times = [seconds for each in freed.values() for seconds in each]
    late, latest = share(times, 0.99), max(times)
    print(
        f"\n{len(times)} of {CLIENTS} had a worker; closed after p99 {late * 1000:.1f} ms, max {latest * 1000:.1f} ms"
    )
    assert late <= 0.1 * leeway()
    assert latest <= 1.0 * leeway()
    assert_nothing_stays(gate, before, folder)


def test_their_permits_are_free(gate: Gateway, fleet: ChaosFleet) -> None:
    assert_all_are_free(gate, fleet, PERMITS)


# --- where nothing is sent to a worker


def test_who_leaves_between_two_attempts_causes_no_other(gate: Gateway, fleet: ChaosFleet, folder: Path) -> None:
    before = held(gate, folder)
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        for client in clients.values():
            fleet.plan("leaves", Status(503), None)
            with Client((gate.host, gate.port)) as leaver:
                leaver.sock.sendall(named("leaves"))
                wait_until("it has failed once", lambda: bool(fleet.attempts_of("leaves")), 5)
            gate.wait_until("it is gone", lambda: gate.in_flight() == 0, BACKOFF_MS / 1000)
            # what is asked afterwards is retried later than it would have been
            fleet.plan("stays", Status(503), None)
            client.sock.sendall(named("stays"))
            assert read_answer(client).headers["x-pointsman-attempts"] == "2"
            assert len(fleet.attempts_of("leaves")) == 1
            fleet.heal()
    assert_nothing_stays(gate, before, folder)


def test_who_leaves_the_queue_gives_its_place_back(fleet: ChaosFleet) -> None:
    shared = {"admission": {"max_concurrent_requests": 1, "queue_size": PLACES}}
    with gateway_with({}, shared, workers=fleet.urls) as (gate, _), Client((gate.host, gate.port)) as holder:
        fleet.plan("holder", Cut(How.HANG))
        holder.sock.sendall(named("holder"))
        wait_until("the only permit is taken", lambda: bool(fleet.attempts_of("holder")), 5)
        for _ in range(3):
            with full_queue(gate):
                assert len(fleet.attempts) == 1
            gate.wait_until("they are gone", lambda: gate.admin("GET", "/status")[1]["connections"] == 1)
        with full_queue(gate) as waiting:
            holder.sock.close()
            assert [read_answer(client).status for client in waiting] == [200] * PLACES
        assert len(fleet.attempts) == 1 + PLACES
        assert_none_is_held(gate)
        gate.wait_until("no load", lambda: gate.in_flight() == 0, 2)


@contextmanager
def full_queue(gate: Gateway) -> Iterator[list[Client]]:
    """The clients that wait, when one more was refused: then all others have their places."""
    with ExitStack() as stack:
        clients = {stack.enter_context(Client((gate.host, gate.port))) for _ in range(PLACES + 1)}
        for client in clients:
            client.sock.sendall(named("waits"))
        readable, _, _ = select.select([client.sock for client in clients], [], [], TIMEOUT_S)
        (refused,) = (client for client in clients if client.sock in readable)
        assert read_answer(refused).status == 429
        yield list(clients - {refused})
