"""The barrier of /pause over two shards: nothing starts at an engine, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from pointsman.daemon.main import main
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.traffic import Client, Traffic, client_of_each, completion


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--flavor", "sglang") as found:
        yield [engine.url for engine in found]


@pytest.fixture
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway(workers=engines) as running:
        yield running


def started(engines: list[str]) -> int:
    total = 0
    for url in engines:
        with urllib.request.urlopen(f"{url}/_sim/state", timeout=30) as answer:
            total += json.load(answer)["inference_requests_total"]
    return total


def has_answered(traffic: Traffic, count: int) -> bool:
    return traffic.report.answered > count


def pause(gate: Gateway, mode: str = "hold", reason: str = "") -> dict[str, Any]:
    began = time.monotonic()
    status, answer = gate.admin("POST", "/pause", {"mode": mode, "reason": reason})
    assert (status, answer["mode"]) == (200, mode)
    assert time.monotonic() - began < 1.5 * leeway()
    return dict(answer)


def resume(gate: Gateway) -> None:
    assert gate.admin("POST", "/resume")[0] == 200


def held(gate: Gateway) -> int:
    return int(gate.admin("GET", "/status")[1]["pause"]["held"])


def test_under_load_nothing_starts_before_resume_and_nothing_is_lost(gate: Gateway, engines: list[str]) -> None:
    with Traffic((gate.host, gate.port), completion(), connections=24) as traffic:
        for _ in range(3):
            answered = traffic.report.answered
            gate.wait_until("requests are answered", partial(has_answered, traffic, answered + 50))
            pause(gate, reason="new weights")
            before = started(engines)
            gate.wait_until("all connections wait", lambda: held(gate) == 24)
            status = gate.admin("POST", "/update_weights_from_disk", {"model_path": "/models/next"})[0]
            assert status == 200
            assert started(engines) == before, "a request started at an engine behind the barrier"
            resume(gate)
        report = traffic.stop()
    assert not report.failures
    assert held(gate) == 0


def test_reject_tells_the_reason_and_when_to_come_back(gate: Gateway, engines: list[str]) -> None:
    pause(gate, "reject", "new weights")
    before = started(engines)
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        for client in clients.values():
            answer = client.ask(completion())
            assert (answer.status, answer.json["error"]["code"]) == (503, "paused")
            assert "new weights" in answer.json["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
    assert started(engines) == before
    resume(gate)
    with Client((gate.host, gate.port)) as client:
        assert client.ask(completion()).status == 200
    assert gate.admin("POST", "/resume")[0] == 409


def test_who_waits_is_refused_when_the_mode_changes(gate: Gateway) -> None:
    pause(gate)
    with Client((gate.host, gate.port)) as client:
        client.sock.sendall(completion())
        gate.wait_until("it waits", lambda: held(gate) == 1)
        pause(gate, "reject", "it takes longer")
        assert client.read().status == 503
    assert held(gate) == 0
    resume(gate)


def test_a_client_that_leaves_waits_no_more(gate: Gateway, engines: list[str]) -> None:
    pause(gate)
    before = started(engines)
    with Client((gate.host, gate.port)) as client:
        client.sock.sendall(completion())
        gate.wait_until("it waits", lambda: held(gate) == 1)
    gate.wait_until("nobody waits", lambda: held(gate) == 0)
    resume(gate)
    with Client((gate.host, gate.port)) as client:
        assert client.ask(completion()).status == 200
    assert started(engines) == before + 1


def test_a_shard_and_control_that_are_replaced_are_paused_too(gate: Gateway, engines: list[str]) -> None:
    pause(gate, reason="new weights")
    before = started(engines)
    (control,) = gate.pids("control")
    for pid in gate.pids("shard"):
        os.kill(pid, signal.SIGKILL)
    os.kill(control, signal.SIGKILL)
    gate.wait_until("all are back", lambda: _is_whole(gate, control))
    shown = gate.admin("GET", "/status")[1]["pause"]
    assert (shown["mode"], shown["reason"]) == ("hold", "new weights")
    with Client((gate.host, gate.port)) as client:
        client.sock.sendall(completion())
        gate.wait_until("it waits", lambda: held(gate) == 1)
        assert started(engines) == before
        resume(gate)
        assert client.read().status == 200


def _is_whole(gate: Gateway, old: int) -> bool:
    try:
        status = gate.admin("GET", "/status")[1]
    except OSError:
        return False
    rows = status["processes"]
    return all(row["state"] == "ready" for row in rows) and old not in [row["pid"] for row in rows]


def test_a_stopped_shard_is_named(gate: Gateway) -> None:
    pid = gate.pids("shard")[0]
    os.kill(pid, signal.SIGSTOP)
    status, answer = gate.admin("POST", "/pause", {})
    try:
        # either it is named, or the supervisor was faster and its successor has said so
        assert status in (200, 504)
        if status == 504:
            assert answer["code"] == "PAUSE_NOT_ACKNOWLEDGED" and "shard-" in answer["error"]
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert gate.admin("GET", "/status")[1]["pause"]["mode"] == "hold"
    resume(gate)


def test_deadlines_of_those_who_wait_and_of_those_at_engines(engines: list[str]) -> None:
    profile = {"timeouts": {"total_s": 1.5, "first_token_s": 0.5}}
    with gateway_with(profile, {}, workers=engines) as (gate, _):
        assert gate.admin("POST", "/pause_generation", {"mode": "in_place"})[0] == 200
        with Client((gate.host, gate.port)) as running, Client((gate.host, gate.port)) as waiting:
            running.sock.sendall(completion("a long one", stream=True))
            gate.wait_until("it is at an engine", lambda: gate.admin("GET", "/status")[1]["in_flight"] == 1)
            pause(gate)
            waiting.sock.sendall(completion())
            answer = waiting.read()
            assert (answer.status, answer.json["error"]["code"]) == (504, "request_total_timeout")
            # its own total is over as well; its first token's clock stood still
            answer = running.read()
            assert (answer.status, answer.json["error"]["code"]) == (504, "request_total_timeout")
        resume(gate)
        assert gate.admin("POST", "/continue_generation")[0] == 200


def test_on_the_command_line(gate: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--admin", f"unix:{gate.folder}/run/admin.sock"]
    assert main(["pause", "--reason", "new weights", *where]) == 0
    assert "held" in capsys.readouterr().out
    assert main(["status", *where]) == 0
    shown = capsys.readouterr().out
    assert "PAUSED" in shown and "new weights" in shown
    assert main(["resume", *where]) == 0
    assert main(["resume", *where]) == 1
