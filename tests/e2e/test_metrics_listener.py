"""`metrics_listen`: an address for metrics and probes alone, bound by the supervisor, served by control."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.promlint import problems
from tests.fakes.prompts import shaped
from tests.fakes.traffic import Client

LISTEN = ("--metrics-listen", "127.0.0.1:0", "--metrics-compat", "sglang")


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with launch_engines(1, "--flavor", "sglang") as engines:
        yield engines[0].url


def ask(gate: Gateway, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    (where,) = gate.wait_log("ready")["metrics"]
    request = urllib.request.Request(f"http://{where}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(text: str) -> dict[str, dict[str, float]]:
    """By the sample's name, its value by the label `worker` (or the empty text)."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[sample.labels.get("worker", "")] = sample.value
    return found


def test_metrics_and_probes_without_a_token_and_nothing_else(engine: str) -> None:
    with gateway(*LISTEN, workers=[engine]) as gate, Client((gate.host, gate.port)) as client:
        for _ in range(3):
            reply = client.ask(shaped("prompt string", "count me", {}, max_tokens=1))
            assert (reply.status, reply.headers["x-smg-routed-worker-id"]) == (200, engine)
        status, text = ask(gate, "/metrics", Host="metrics.example:9090")
        assert (status, problems(text)) == (200, [])
        found = samples(text)
        assert found["pointsman_worker_picks_total"] == found["sgl_router_processed_requests_total"] == {engine: 3}
        assert found["smg_worker_health"] == {engine: 1}
        assert samples(gate.admin("GET", "/metrics")[1]).keys() >= found.keys()

        assert ask(gate, "/health") == (200, "OK")
        status, text = ask(gate, "/readiness")
        assert (status, json.loads(text)) == (200, {"status": "ready", "healthy_workers": 1, "total_workers": 1})
        for path in ("/", "/workers", "/status", "/config", "/engine_metrics", "/docs"):
            assert ask(gate, path)[0] == 404, path
        assert ask(gate, "/metrics", "POST")[0] == 405


def test_a_removed_workers_series_disappear_and_readiness_turns(engine: str) -> None:
    with gateway(*LISTEN, workers=[engine]) as gate:
        assert f'worker="{engine}"' in ask(gate, "/metrics")[1]
        worker = gate.workers()[0]["id"]
        assert gate.admin("DELETE", f"/workers/{worker}")[0] == 202
        status, text = ask(gate, "/readiness")
        assert (status, json.loads(text)["reason"]) == (503, "insufficient healthy workers")
        text = ask(gate, "/metrics")[1]
        assert engine not in text
        assert samples(text)["sgl_router_active_workers"] == {"": 0}


def test_the_port_outlives_control() -> None:
    with gateway(*LISTEN) as gate:
        (control,) = gate.pids("control")
        os.kill(control, signal.SIGKILL)
        assert ask(gate, "/health") == (200, "OK")


def test_the_port_is_handed_over(engine: str) -> None:
    with gateway(*LISTEN, workers=[engine]) as gate:
        (before,) = gate.wait_log("ready")["metrics"]
        done = gate.upgrade("--json")
        assert done.returncode == 0, done.stdout + done.stderr
        after = gate.wait_log("ready", pid=json.loads(done.stdout)["pid"])["metrics"]
        assert after == [before]
        assert ask(gate, "/readiness")[0] == 200


def test_the_workers_url_is_told_only_if_it_may_be(engine: str) -> None:
    with gateway("--no-routed-worker-header", workers=[engine]) as gate, Client((gate.host, gate.port)) as client:
        assert "x-smg-routed-worker-id" not in client.ask(shaped("prompt string", "x", {}, max_tokens=1)).headers


def test_an_address_in_use_is_named_with_its_flag(engine: str) -> None:
    port = engine.rpartition(":")[2]
    problem = f"port {port} on 127.0.0.1 is in use; choose another with --metrics-listen"
    with pytest.raises(AssertionError, match=problem), gateway("--metrics-listen", f"127.0.0.1:{port}"):
        pass
