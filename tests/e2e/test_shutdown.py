"""How the daemon stops, as an operator and a load balancer see it: signals, readiness, running streams, exit codes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.processes import wait_gone
from tests.fakes.traffic import LAST_CHUNK, Client, Reply, Traffic, client_of_each, completion

TOKEN_S = 0.05
"""of the paced engine"""
ENDLESS = completion(max_tokens=100_000, stream=True)
DRAIN_DELAY_S = 2.0


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """7 ms a token at its own speed."""
    with launch_engines(1, "--preset", "h100-8b", "--speed", str(0.007 / TOKEN_S)) as running:
        yield running[0].url


@pytest.fixture(scope="module")
def quick_engine() -> Iterator[str]:
    with launch_engines(1) as running:
        yield running[0].url


def stream_of(duration_s: float) -> bytes:
    return completion(max_tokens=int(duration_s / TOKEN_S), stream=True)


def begin(client: Client, wire: bytes) -> dict[str, str]:
    """Returns the head of a stream whose first event has arrived."""
    client.sock.sendall(wire)
    head = client.read_head()
    assert head[":status"] == "200"
    client.rest += client.read_more()
    return head


def not_ready(client: Client) -> Reply | None:
    reply = client.get("/readiness")
    return reply if reply.status == 503 else None


def address_of(gate: Gateway) -> tuple[str, int]:
    return gate.host, gate.port


def processes_of(gate: Gateway) -> list[int]:
    return [gate.process.pid, *gate.children()]


def assert_nothing_left(gate: Gateway, pids: list[int]) -> None:
    wait_gone(pids, timeout_s=1)
    assert not gate.socket_path.exists()
    admin_host, _, admin_port = gate.admin_tcp.rpartition(":")
    for address in (address_of(gate), (admin_host, int(admin_port))):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what went through it may linger in TIME_WAIT
            sock.bind(address)


def ended(gate: Gateway, within_s: float) -> int:
    code = gate.wait_ended(within_s)
    gate.close()
    return code


def refuses_connections(address: tuple[str, int]) -> bool:
    """Says so at once: a connection that is accepted by nobody would keep its client waiting for the grace."""
    try:
        with socket.create_connection(address, timeout=1) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            return sock.recv(1) == b""
    except TimeoutError:
        raise AssertionError("a connection hangs in the queue of a listener that nobody accepts from") from None
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_stops_in_less_than_a_second(engine: str, number: signal.Signals) -> None:
    with gateway(workers=[engine]) as gate:
        pids = processes_of(gate)
        assert len(pids) == 4
        with Client(address_of(gate)) as idle:
            assert idle.get("/readiness").status == 200
            started = time.monotonic()
            gate.signal(number)
            assert ended(gate, within_s=5) == 0
            took = time.monotonic() - started
            assert idle.read_more() == b"", "an idle connection is closed, not reset"
        assert_nothing_left(gate, pids)
    print(f"\nidle {number.name}: {took:.2f} s")
    assert took < 1.0 * leeway()


@pytest.mark.slow
def test_running_streams_end_before_the_daemon_does(engine: str) -> None:
    """Readiness 503 at once, `Connection: close` on whatever is answered from then on, exit 0 before the grace."""
    with (
        gateway("--drain-delay-s", str(DRAIN_DELAY_S), workers=[engine]) as gate,
        client_of_each(gate.pids("shard"), address_of(gate)) as streams,
        client_of_each(gate.pids("shard"), address_of(gate)) as waiting,
    ):
        pids = processes_of(gate)
        for client in streams.values():
            begin(client, stream_of(DRAIN_DELAY_S + 2.0))
        started = time.monotonic()
        gate.signal(signal.SIGTERM)
        gate.wait_log("stopping", timeout_s=2)

        for client in waiting.values():  # kept-alive connections of both shards, as soon as it is told
            reply = gate.wait_until("the shard has heard of it", partial(not_ready, client), 1)
            assert reply is not None
            assert reply.json["reason"] == "draining"
            assert reply.headers["connection"] == "close"
            assert client.read_more() == b""
        assert time.monotonic() - started < DRAIN_DELAY_S - 0.1, "this test is too slow to see the delay"
        with Client(address_of(gate)) as late:  # drain_delay_s: still accepted, and served
            reply = late.ask(completion())
            assert reply.status == 200
            assert reply.headers["connection"] == "close"
        assert gate.admin("GET", "/status")[1]["state"] == "draining"
        gate.wait_until("only the streams run", lambda: gate.in_flight() == 2, 2)

        gate.wait_until(
            "no more connections after the delay", lambda: refuses_connections(address_of(gate)), DRAIN_DELAY_S + 5
        )
        for client in streams.values():
            answer = client.read_to_end()
            assert answer.endswith(LAST_CHUNK)
            assert b"data: [DONE]\n\n" in answer
        assert ended(gate, within_s=10) == 0
        assert time.monotonic() - started < 10, "long before the grace of 30 s"
        assert_nothing_left(gate, pids)


def test_without_a_delay_new_connections_are_refused_at_once(engine: str) -> None:
    with gateway(workers=[engine]) as gate:
        with Client(address_of(gate)) as client:
            begin(client, stream_of(1.0))
            gate.signal(signal.SIGTERM)
            gate.wait_log("stopping", timeout_s=2)
            gate.wait_until("no more connections", lambda: refuses_connections(address_of(gate)), 0.5)
            assert client.read_to_end().endswith(LAST_CHUNK)
        assert ended(gate, within_s=5) == 0


def test_requests_that_were_not_streamed_are_answered_too(engine: str) -> None:
    with (
        gateway(workers=[engine]) as gate,
        client_of_each(gate.pids("shard"), address_of(gate)) as clients,
    ):
        for client in clients.values():
            client.sock.sendall(completion(max_tokens=int(0.8 / TOKEN_S)))
        gate.wait_until("both run", lambda: gate.in_flight() == 2)
        gate.signal(signal.SIGTERM)
        for client in clients.values():
            reply = client.read()
            assert reply.status == 200
            assert reply.headers["connection"] == "close"
            assert reply.json["usage"]["completion_tokens"] == int(0.8 / TOKEN_S)
        assert ended(gate, within_s=5) == 0


def test_under_load_every_request_that_was_sent_is_answered(quick_engine: str) -> None:
    """Also one that was on its way when its connection had just become idle."""
    with (
        gateway(workers=[quick_engine]) as gate,
        Traffic(address_of(gate), completion(), connections=48, reconnects=False) as traffic,
    ):
        gate.wait_until("the load runs", lambda: traffic.report.answered > 1000)
        started = time.monotonic()
        gate.signal(signal.SIGTERM)
        report = traffic.wait()
        assert ended(gate, within_s=5) == 0
        took = time.monotonic() - started
    assert report.failures == []
    assert took < 1.0 * leeway()


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_start_leaves_nothing(tmp_path: Path, quick_engine: str) -> None:
    """At any moment: before there is a supervisor the signal simply ends the process, from then on it is a stop."""
    codes = []
    for turn in range(8):
        gate = Gateway(tmp_path, ["--shards", "2", "--workers", quick_engine])
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and len(gate.children()) < min(turn, 3):
            time.sleep(0.002)  # the moments are spread over the start by what it has done so far
        if turn > 4:
            gate.wait_log(("config_read", "generation_published", "ready")[turn - 5])
        pids = processes_of(gate)
        gate.signal(signal.SIGTERM)
        codes.append(ended(gate, within_s=5))
        wait_gone(pids, timeout_s=1)
        assert not gate.socket_path.exists()
    assert set(codes) <= {0, -signal.SIGTERM}
    assert codes[-1] == 0


def test_what_runs_past_the_grace_is_cut_honestly(engine: str) -> None:
    """No final chunk, no `[DONE]`: an error event, then the end; a request without a head yet gets 503."""
    with gateway("--shutdown-grace-s", "0.5", workers=[engine]) as gate:
        pids = processes_of(gate)
        with Client(address_of(gate)) as streamed, Client(address_of(gate)) as plain:
            begin(streamed, ENDLESS)
            plain.sock.sendall(completion(max_tokens=100_000))
            gate.wait_until("both run", lambda: gate.in_flight() == 2)
            started = time.monotonic()
            gate.signal(signal.SIGTERM)
            answer = streamed.read_to_end()
            refusal = plain.read()
            assert ended(gate, within_s=5) == 0
            took = time.monotonic() - started
        assert not answer.endswith(LAST_CHUNK)
        assert b"[DONE]" not in answer
        assert b'data: {"error"' in answer.rsplit(b"\n\n", 2)[-2], answer[-500:]
        assert refusal.status == 503
        assert refusal.headers["connection"] == "close"
        assert 0.5 <= took < 2.0 * leeway()
        assert_nothing_left(gate, pids)


def test_a_second_signal_means_now(engine: str) -> None:
    with gateway(workers=[engine]) as gate:
        pids = processes_of(gate)
        with Client(address_of(gate)) as client:
            begin(client, ENDLESS)
            gate.signal(signal.SIGTERM)
            gate.wait_log("stopping", timeout_s=2)
            assert gate.process.poll() is None, "it waits for the stream"
            started = time.monotonic()
            gate.signal(signal.SIGTERM)
            assert ended(gate, within_s=5) == 0
            took = time.monotonic() - started
            answer = b""
            with suppress(ConnectionResetError):  # nobody is left to say goodbye
                answer = client.read_to_end()
            assert not answer.endswith(LAST_CHUNK)
            assert b"[DONE]" not in answer
        assert_nothing_left(gate, pids)
    assert took < 0.5 * leeway()


@pytest.mark.slow
def test_a_stopped_shard_does_not_hold_up_a_stop(engine: str) -> None:
    """It is killed when its heart is missed, not when the grace is over; the other shard finishes what it does."""
    with gateway(workers=[engine]) as gate:
        pids = processes_of(gate)
        victim, survivor = shards = gate.pids("shard")
        with client_of_each(shards, address_of(gate)) as clients:
            for client in clients.values():
                begin(client, stream_of(4.0))
            os.kill(victim, signal.SIGSTOP)
            started = time.monotonic()
            gate.signal(signal.SIGTERM)
            assert clients[survivor].read_to_end().endswith(LAST_CHUNK)
            assert ended(gate, within_s=5) == 0
            assert time.monotonic() - started < 6, "long before the grace of 30 s"
        assert_nothing_left(gate, pids)


def test_a_stopped_shard_does_not_hold_up_a_second_signal(engine: str) -> None:
    with gateway(workers=[engine]) as gate:
        pids = processes_of(gate)
        os.kill(gate.pids("shard")[0], signal.SIGSTOP)
        gate.signal(signal.SIGTERM)
        gate.wait_log("stopping", timeout_s=2)
        gate.signal(signal.SIGTERM)
        assert ended(gate, within_s=2) == 0
        assert_nothing_left(gate, pids)


def test_sighup_reads_the_files_again(engine: str) -> None:
    """Also when nothing changed, so that nothing but the signal can have been the reason."""
    with gateway(workers=[engine]) as gate:
        reads = len([line for line in gate.log if line["event"] == "config_read"])
        before = gate.admin("GET", "/config")[1]
        pids = processes_of(gate)
        gate.signal(signal.SIGHUP)
        gate.wait_until(
            "the files were read again",
            lambda: len([line for line in gate.log if line["event"] == "config_read"]) == reads + 1,
        )
        after = gate.admin("GET", "/config")[1]
        assert after["last_reload_at"] > before["last_reload_at"]
        assert after["last_reload_ok"]
        assert after["generation"] == before["generation"], "what did not change makes no generation"
        assert processes_of(gate) == pids


def test_sighup_applies_what_changed(engine: str, tmp_path: Path) -> None:
    profiles = tmp_path / "profiles.json"
    profiles.write_text('{"profiles": {"one": {}}, "defaultProfile": "one"}')
    with (
        gateway("--profiles", str(profiles), workers=[engine]) as gate,
        client_of_each(gate.pids("shard"), address_of(gate)) as clients,
    ):
        profiles.write_text('{"profiles": {"two": {}}, "defaultProfile": "two"}')
        gate.signal(signal.SIGHUP)
        for client in clients.values():
            gate.wait_until("the new profile", partial(uses_profile, client, "two"))


def uses_profile(client: Client, name: str) -> bool:
    return client.ask(completion()).profile == name
