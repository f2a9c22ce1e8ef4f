"""Fan-outs of a real daemon with two shards: engines of two kinds, among them a dead, a slow and a stumbling one."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.prompts import prompt_text, shaped
from tests.fakes.traffic import Client

EXPLAIN = {"x-pointsman-explain": "1"}
NOT_THERE = {"kind": "status", "status": 404}


def state(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/_sim/state", timeout=30) as answer:
        return dict(json.load(answer))


def running(url: str) -> int:
    found: int = state(url)["requests_running"]
    return found


def asked(url: str, path: str) -> int:
    return int(state(url)["requests_by_path"].get(path, 0))


def arm(url: str, *faults: dict[str, Any]) -> None:
    data = json.dumps(list(faults)).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/_sim/faults", data, method="POST"), timeout=30).close()


def matched(gate: Gateway, text: str) -> dict[str, int]:
    """By worker, what is believed to be cached of the prompt; the request itself is answered too."""
    with Client((gate.host, gate.port)) as client:
        reply = client.ask(shaped("prompt string", text, EXPLAIN, max_tokens=1))
    assert reply.status == 200
    return dict(json.loads(reply.headers["x-pointsman-decision"])["explanation"]["matched_tokens"])


def result_of(answer: dict[str, Any], url: str) -> dict[str, Any]:
    (found,) = [result for result in answer["results"] if result["url"] == url]
    return dict(found)


@pytest.fixture(scope="module")
def sglang() -> Iterator[list[str]]:
    with launch_engines(3, "--flavor", "sglang") as engines:
        yield [engine.url for engine in engines]


@pytest.fixture(scope="module")
def vllm() -> Iterator[str]:
    """With the paths that only the simulated one has, beside its own, taken away."""
    paths = ("/flush_cache", "/pause_generation", "/continue_generation", "/abort_request", "/update_weights_from_disk")
    faults = [argument for path in paths for argument in ("--fault", json.dumps(NOT_THERE | {"path": path}))]
    with launch_engines(1, *faults) as engines:
        yield engines[0].url


@pytest.fixture(scope="module")
def gate(sglang: list[str], vllm: str) -> Iterator[Gateway]:
    with gateway(workers=[*sglang, vllm]) as running:
        yield running


def test_one_dead_and_one_slow_worker_and_one_that_stumbles(sglang: list[str], dead_port: int) -> None:
    slow, stumbling, sound = sglang
    dead = f"http://127.0.0.1:{dead_port}"
    with ExitStack() as stack:
        stack.callback(arm, slow)
        stack.callback(arm, stumbling)
        gate = stack.enter_context(gateway(workers=sglang))
        before = {url: asked(url, "/flush_cache") for url in sglang}
        gate.add_worker(dead)
        arm(slow, {"kind": "hang", "path": "/flush_cache"})
        arm(stumbling, {"kind": "status", "status": 503, "path": "/flush_cache", "times": 1})

        started = time.monotonic()
        status, answer = gate.admin("POST", "/flush_cache?timeout_s=1&include_down=1")
        assert 0.9 < time.monotonic() - started < 5 * leeway()

        assert status == 206
        assert (answer["status"], answer["timeout_s"]) == ("partial_success", 1)
        assert answer["succeeded"] == [stumbling, sound]
        assert answer["unsupported"] == []
        errors = {failed["worker"]: failed["error"] for failed in answer["failed"]}
        assert errors == {slow: result_of(answer, slow)["error"], dead: "connection refused"}
        assert errors[slow].startswith("no answer within ")

        attempts = {url: result_of(answer, url)["attempts"] for url in (slow, stumbling, sound, dead)}
        assert attempts == {slow: 1, stumbling: 2, sound: 1, dead: 3}
        assert {url: asked(url, "/flush_cache") - before[url] for url in sglang} == {slow: 1, stumbling: 2, sound: 1}
        assert result_of(answer, sound)["body"] == "Cache flushed.\n"
        assert result_of(answer, slow)["latency_ms"] >= 900

        _, answer = gate.admin("POST", f"/flush_cache?worker={sound}&worker={dead}")
        assert (answer["succeeded"], answer["failed"][0]["worker"]) == ([sound], dead)
        down = result_of(answer, dead)
        assert (down["attempts"], down["path"]) == (0, None)
        assert down["error"] == "not asked: it is pending (connection refused)"


def test_after_a_flush_a_repeated_prompt_matches_nowhere(gate: Gateway, sglang: list[str], vllm: str) -> None:
    text = prompt_text("to be flushed")
    assert set(matched(gate, text).values()) == {0}
    assert max(matched(gate, text).values()) > 0
    status, answer = gate.admin("POST", "/flush_cache")
    assert (status, answer["succeeded"]) == (200, [*sglang, vllm])
    assert result_of(answer, vllm)["path"] == "/reset_prefix_cache"
    assert set(matched(gate, text).values()) == {0}
    gate.wait_log("cache_forgotten", worker=vllm, reason="flush_cache")


def test_only_the_one_that_was_flushed_is_forgotten(gate: Gateway) -> None:
    text = prompt_text("kept elsewhere")
    matched(gate, text)
    (holder,) = [url for url, tokens in matched(gate, text).items() if tokens]
    other = next(worker for worker in gate.workers() if worker["url"] != holder)
    assert gate.admin("POST", f"/flush_cache?worker={other['id']}")[0] == 200
    assert matched(gate, text)[holder] > 0
    assert gate.admin("POST", f"/flush_cache?worker={holder}&model=sim-model")[0] == 200
    assert matched(gate, text)[holder] == 0


@pytest.mark.parametrize("operation", ["update_weights_from_disk", "update_weights_from_distributed"])
def test_new_weights_are_a_cold_cache(gate: Gateway, sglang: list[str], vllm: str, operation: str) -> None:
    text = prompt_text(operation)
    to_the_first = {"X-SMG-Target-Worker": "0"}
    with Client((gate.host, gate.port)) as client:
        assert client.ask(shaped("prompt string", text, to_the_first, max_tokens=1)).status == 200
    assert matched(gate, text)[sglang[0]] > 0
    status, answer = gate.admin("POST", f"/{operation}", {"model_path": "/new", "weight_version": "7"})
    assert (status, answer["succeeded"], answer["unsupported"]) == (206, sglang, [vllm])
    assert matched(gate, text)[sglang[0]] == 0
    assert state(sglang[0])["weight_version"] == "7"


def test_pause_and_continue_in_the_words_of_each(gate: Gateway, sglang: list[str], vllm: str) -> None:
    status, answer = gate.admin("POST", "/pause_generation", {"mode": "in_place"})
    assert status == 200
    assert result_of(answer, vllm)["path"] == "/pause?mode=keep"
    assert all(state(url)["is_paused"] for url in (*sglang, vllm))
    assert gate.admin("POST", "/continue_generation")[0] == 200
    assert not any(state(url)["is_paused"] for url in (*sglang, vllm))

    status, answer = gate.admin("POST", "/pause_generation", {"mode": "retract"})
    assert (status, answer["unsupported"]) == (206, [vllm])
    assert not state(vllm)["is_paused"]
    assert gate.admin("POST", "/continue_generation")[0] == 200


def test_memory_is_released_and_taken_again(gate: Gateway, sglang: list[str], vllm: str) -> None:
    status, answer = gate.admin("POST", "/release_memory_occupation")
    assert (status, result_of(answer, vllm)["path"]) == (200, "/sleep?level=1")
    assert all(state(url)["is_asleep"] for url in (*sglang, vllm))

    status, answer = gate.admin("POST", "/release_memory_occupation")
    assert (status, answer["succeeded"]) == (206, [vllm])
    assert {result["attempts"] for result in answer["results"]} == {1}, "not to be done twice"

    assert gate.admin("POST", "/resume_memory_occupation", {"tags": ["weights", "kv_cache"]})[0] == 200
    assert not any(state(url)["is_asleep"] for url in (*sglang, vllm))


def test_profiles(gate: Gateway, sglang: list[str], vllm: str) -> None:
    assert gate.admin("POST", "/start_profile", {"num_steps": 3})[0] == 200
    assert all(state(url)["is_profiling"] for url in (*sglang, vllm))
    assert gate.admin("POST", "/stop_profile")[0] == 200


@pytest.mark.parametrize("rid", ["victim", None])
def test_running_requests_are_aborted_wherever_they_are(
    gate: Gateway, sglang: list[str], vllm: str, rid: str | None
) -> None:
    for position, url in ((0, sglang[0]), (3, vllm)):
        assert gate.admin("POST", "/pause_generation", {"mode": "in_place"})[0] == 200
        headers = {"X-SMG-Target-Worker": str(position), "x-request-id": "victim"}
        with Client((gate.host, gate.port)) as client:
            client.sock.sendall(shaped("prompt string", "long", headers, max_tokens=50))
            gate.wait_until("it runs", partial(running, url))
            status, answer = gate.admin("POST", "/abort_request", {"rid": rid} if rid else {"abort_all": True})
            assert (status, len(answer["succeeded"])) == (200, 4)
            assert client.read().json["choices"][0]["finish_reason"] == "abort"
        assert gate.admin("POST", "/continue_generation")[0] == 200


def test_loads(gate: Gateway, sglang: list[str]) -> None:
    status, answer = gate.admin("GET", "/get_loads")
    assert status == 200
    assert [worker["worker"] for worker in answer["workers"][:3]] == sglang
    assert all(worker["load"] >= 0 and worker["details"]["loads"] for worker in answer["workers"][:3])


def test_all_engines_metrics_are_one_valid_page(gate: Gateway, sglang: list[str], vllm: str) -> None:
    gate.add_worker("http://127.0.0.1:9")
    try:
        status, text = gate.admin("GET", "/engine_metrics")
    finally:
        assert gate.admin("DELETE", "/workers/http:%2F%2F127.0.0.1:9")[0] == 202
    assert status == 200
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert {"vllm:num_requests_running", "sglang:num_running_reqs"} <= set(names)
    by_name = {family.name: family for family in families}
    assert {s.labels["worker"] for s in by_name["sglang:num_running_reqs"].samples} == set(sglang)
    ups = {s.labels["worker"]: s.value for s in by_name["pointsman_engine_metrics_up"].samples}
    assert ups == dict.fromkeys((*sglang, vllm), 1.0) | {"http://127.0.0.1:9": 0.0}


@pytest.mark.parametrize(
    ("path", "code"),
    [("/flush_cache?worker=nobody", "WORKER_NOT_FOUND"), ("/flush_cache?model=nothing", "MODEL_NOT_FOUND")],
)
def test_a_filter_that_leaves_nobody_is_404(gate: Gateway, path: str, code: str) -> None:
    status, answer = gate.admin("POST", path)
    assert (status, answer["code"]) == (404, code)


def test_the_workers_own_key_is_used_and_never_shown(sglang: list[str]) -> None:
    with gateway() as gate:
        gate.add_worker(sglang[0], api_key="sk-of-the-worker")
        gate.wait_healthy(1)
        status, answer = gate.admin("POST", "/flush_cache")
        assert status == 200
        assert "sk-of-the-worker" not in json.dumps(answer) + gate.log_text()
    last = [request for request in state(sglang[0])["requests"] if request["path"] == "/flush_cache"][-1]
    headers = {name.lower(): value for name, value in last["headers"]}
    assert headers["authorization"] == "Bearer sk-of-the-worker"
