"""Clients that dawdle over the head, the body, or reading their answer: none of them holds anything for long."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.answers import read_answer
from tests.fakes.chaos import ChaosFleet, chaos
from tests.fakes.gateway import Gateway
from tests.fakes.leeway import leeway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.permits import named
from tests.fakes.processes import wait_until
from tests.fakes.traffic import Client, client_of_each

PATIENCE_S = 0.5
FLAGS = ("--header-timeout-s", str(PATIENCE_S), "--body-timeout-s", str(PATIENCE_S))
DEFAULT = {"timeouts": {"client_body_s": PATIENCE_S, "client_read_s": PATIENCE_S, "idle_s": 0.2}}


@pytest.fixture(scope="module")
def fleet() -> Iterator[ChaosFleet]:
    with launch_engines(1) as engines, chaos([engine.url for engine in engines]) as running:
        yield running


@pytest.fixture(scope="module")
def gate(fleet: ChaosFleet) -> Iterator[Gateway]:
    with gateway_with(DEFAULT, {}, *FLAGS, workers=fleet.urls) as (running, _):
        yield running


@pytest.fixture(autouse=True)
def healed(fleet: ChaosFleet) -> Iterator[None]:
    yield
    fleet.heal()


@pytest.mark.parametrize("sent", [20, -10], ids=["head", "body"])
def test_a_request_that_stops_half_way_ends_with_408(gate: Gateway, fleet: ChaosFleet, sent: int) -> None:
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        for client in clients.values():
            started = time.monotonic()
            client.sock.sendall(named("slow")[:sent])
            answer = read_answer(client)
            assert (answer.status, answer.error_code) == (408, "request_timeout")
            assert client.sock.recv(1) == b""
            assert 0.9 * PATIENCE_S <= time.monotonic() - started <= 4 * PATIENCE_S * leeway()
    assert fleet.attempts == []
    gate.wait_until("nothing is held", lambda: gate.admin("GET", "/status")[1]["buffered_bytes"] == 0)


def test_a_body_that_keeps_coming_may_take_its_time(gate: Gateway) -> None:
    """It is the pauses that count."""
    pause = threading.Event()
    with Client((gate.host, gate.port)) as client:
        wire = named("steady")
        for begin in range(0, len(wire), 20):
            client.sock.sendall(wire[begin : begin + 20])
            pause.wait(PATIENCE_S / 5)
        assert len(wire) / 20 * PATIENCE_S / 5 > 1.5 * PATIENCE_S
        assert read_answer(client).status == 200


def test_who_does_not_read_is_left(gate: Gateway, fleet: ChaosFleet) -> None:
    """The worker is not idle meanwhile: it is us who do not read from it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect((gate.host, gate.port))
        sock.sendall(named("unread", stream=True, max_tokens=100_000))
        wait_until("a worker has it", lambda: bool(fleet.attempts_of("unread")), 5)
        (attempt,) = fleet.attempts_of("unread")
        wait_until("the worker is freed", lambda: attempt.closed_at < math.inf, 10)
        assert attempt.closed_at - attempt.at >= 0.9 * PATIENCE_S
        gate.wait_until("no load", lambda: gate.in_flight() == 0, 1)
    line = gate.wait_log("request", id="unread", timeout_s=5)
    assert (line["status"], line["end"]) == (200, "timeout")


def test_who_reads_slowly_gets_all_of_it(gate: Gateway) -> None:
    tokens = 20_000
    pause = threading.Event()
    with socket.socket() as sock, Client((gate.host, gate.port)) as client:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.settimeout(10)
        sock.connect((gate.host, gate.port))
        client.sock.close()
        client.sock = sock
        sock.sendall(named("slowly", stream=True, max_tokens=tokens))
        for _ in range(10):
            client.rest += sock.recv(65536)
            pause.wait(PATIENCE_S / 3)
        answer = read_answer(client)
    assert answer.is_whole
    assert len(answer.text) == 4 * tokens
