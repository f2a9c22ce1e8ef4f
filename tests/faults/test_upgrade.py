"""Ten upgrades, and five restarts with socket activation, under load: nobody is refused, reset or cut."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.processes import open_files, resident_bytes, wait_gone, wait_until
from tests.fakes.service_manager import ServiceManager
from tests.fakes.traffic import LAST_CHUNK, Client, Traffic, completion, request

UPGRADES = 10
STREAMS = 6
"""begun before each upgrade, ended after it"""
TOKENS = 600
TOKEN_S = 0.05
ONCE = request({"model": "sim-model", "prompt": "count", "max_tokens": 1}, headers={"Connection": "close"})


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def slow_engine() -> Iterator[str]:
    """Another model, a token every 50 ms."""
    with launch_engines(1, "--model", "slow-model", "--preset", "h100-8b", "--speed", str(0.007 / TOKEN_S)) as running:
        yield running[0].url


def read_stream(client: Client) -> int:
    """Reads a stream to its end; returns how many tokens it had. Fails if it was cut."""
    with client:
        text = client.read_to_end()
    assert text.endswith(LAST_CHUNK), f"cut after {len(text)} bytes: {text[-300:]!r}"
    assert b"data: [DONE]\n\n" in text, f"cut after {len(text)} bytes: {text[-300:]!r}"
    lines = [line for line in text.split(b"\n") if line.startswith(b"data: {")]
    return sum(bool(choice["text"]) for line in lines for choice in json.loads(line[6:])["choices"])


def begun(gate: Gateway, pool: ThreadPoolExecutor, count: int) -> list[Future[int]]:
    """Streams of which the head has arrived."""
    wire = request(
        {"model": "slow-model", "prompt": "tell", "max_tokens": TOKENS, "stream": True},
        headers={"Connection": "close"},
    )
    clients = [Client((gate.host, gate.port), timeout_s=30) for _ in range(count)]
    for client in clients:
        client.sock.sendall(wire)
    for client in clients:
        assert client.read_head()[":status"] == "200"
    return [pool.submit(read_stream, client) for client in clients]


@pytest.mark.timeout(600)
def test_ten_upgrades_under_load_with_long_streams(engines: list[str], slow_engine: str) -> None:
    streams: list[Future[int]] = []
    took: list[float] = []
    with (
        gateway(workers=[*engines, slow_engine]) as gate,
        ThreadPoolExecutor(UPGRADES * STREAMS) as pool,
        Traffic((gate.host, gate.port), completion(), connections=16) as kept,
        Traffic((gate.host, gate.port), ONCE, connections=8) as single,
    ):
        descriptors = len(open_files(gate.main_pid))
        memory = resident_bytes([gate.main_pid])
        for _ in range(UPGRADES):
            streams += begun(gate, pool, STREAMS)
            done = gate.upgrade("--json")
            assert done.returncode == 0, done.stdout + gate.log_text()
            answer = json.loads(done.stdout)
            took.append(answer["took_s"])
            assert answer["in_flight"] >= STREAMS, "the streams last longer than the upgrade"
            gate.wait_log("ready", pid=answer["pid"])
        tokens = [one.result(120) for one in streams]
        reports = kept.stop(), single.stop()
        assert gate.wait_ended(20) == 0
        wait_gone(gate.successors[:-1], 20)
        assert len(open_files(gate.main_pid)) == descriptors
        assert resident_bytes([gate.main_pid]) < memory + 8 * 2**20
        gate.wait_until("nothing is in flight", lambda: gate.in_flight() == 0)

    print(f"\n{UPGRADES} upgrades of {min(took):.1f} to {max(took):.1f} s, {len(tokens)} streams")
    for name, report in zip(("kept connections", "connections of their own"), reports, strict=True):
        print(f"{report.answered} requests on {name}, the longest {report.longest_s * 1000:.0f} ms")
    assert tokens == [TOKENS] * (UPGRADES * STREAMS)
    for report in reports:
        assert report.failures == []
        assert report.backwards == []
        assert report.answered > 1000


@pytest.mark.timeout(600)
def test_restarts_with_socket_activation_refuse_nobody(tmp_path: Path, engines: list[str]) -> None:
    """What connects meanwhile waits: its longest wait is the gap in which nobody accepts."""
    gaps = []
    with ExitStack() as stack:
        data = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        manager = stack.enter_context(ServiceManager(tmp_path, [data]))
        manager.start("--workers", *engines)
        manager.wait("READY=1")
        for _ in range(5):
            with Traffic(data.getsockname(), ONCE, connections=16) as traffic:
                wait_until("the load runs", lambda: traffic.report.answered > 200, 10)
                assert manager.stop() == 0
                manager.start("--workers", *engines)
                manager.wait("READY=1")
                report = traffic.stop()
            assert report.failures == []
            gaps.append(report.longest_s)
        assert manager.stop() == 0
    print(f"\nlongest waits over a restart: {', '.join(f'{gap:.2f}' for gap in sorted(gaps))} s")
    assert max(gaps) < 5 * leeway()
