"""Why requests go where they go, asked as an operator does: /explain, /decisions, /workers/ID/why, on two shards."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.prompts import MODEL, prompt_text, shaped
from tests.fakes.traffic import Client

TEXT = prompt_text("explained", 4096)
PROFILES = {
    "defaultProfile": "chat",
    "profiles": {
        "chat": {"routingStrategy": "expected_cost"},
        "agg": {"routingStrategy": "least-request:1,prefix-cache:3"},
    },
    "match": [{"profile": "agg", "header": {"x-team": "eval"}}],
}


@pytest.fixture(scope="module")
def gate() -> Iterator[Gateway]:
    with ExitStack() as stack:
        engines = stack.enter_context(launch_engines(3))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "profiles.json").write_text(json.dumps(PROFILES))
        arguments = ("--profiles-file", str(folder / "profiles.json"), "--decision-sample-interval-s", "0.001")
        yield stack.enter_context(gateway(*arguments, workers=[engine.url for engine in engines], folder=folder))


def ask(gate: Gateway, text: str = TEXT, **fields: Any) -> str:
    """Sends it streamed; returns its request id."""
    with Client((gate.host, gate.port)) as client:
        options: dict[str, Any] = {"max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}} | fields
        reply = client.ask(shaped("prompt string", text, **options))
        assert reply.status == 200
        return str(reply.headers["x-request-id"])


def explain(gate: Gateway, **fields: Any) -> dict[str, Any]:
    body = {"request": {"model": MODEL, "prompt": TEXT}, "path": "/v1/completions", **fields}
    status, found = gate.admin("POST", "/explain", body)
    assert status == 200, found
    return dict(found)


def state(gate: Gateway) -> list[tuple[int, int]]:
    return [(worker["in_flight"], worker["picks"]) for worker in gate.workers()]


def test_a_request_is_explained_and_nothing_is_booked(gate: Gateway) -> None:
    ask(gate)
    before = state(gate)
    found = explain(gate)
    assert (found["profile"], found["profile_by"], found["policy"]) == ("chat", "default profile", "expected_cost")
    assert (found["policy_by"], found["prompt_chars"], found["prompt_tokens"]) == ("profile", 4096, 1024)
    best = found["candidates"][0]
    assert best["is_picked"]
    assert (best["worker"], best["matched_chars"], best["matched_tokens"]) == (found["worker"], 4096, 1023)
    assert set(best["scorers"]) == {"wait_s", "memory_s", "pinned_s", "prefill_s"}
    assert best["total"] == min(row["total"] for row in found["candidates"])
    assert found["reason"] == "prefix"
    assert state(gate) == before
    again = explain(gate)
    assert again["candidates"][0]["matched_chars"] == 4096


def test_headers_names_and_drafts(gate: Gateway) -> None:
    by_match = explain(gate, headers={"X-Team": "eval"})
    assert (by_match["profile"], by_match["profile_by"]) == ("agg", "match")
    assert set(by_match["candidates"][0]["scorers"]) == {"least_request", "prefix_cache"}
    assert explain(gate, profile="agg")["profile_by"] == "asked for"
    asked = explain(gate, headers={"routing-strategy": "lmetric"})
    assert (asked["policy"], asked["policy_by"]) == ("lmetric", "header routing-strategy")
    draft = explain(gate, profile={"chain": [{"scorer": "prefix-cache", "within": 10}, {"scorer": "least-latency"}]})
    assert (draft["profile"], draft["policy"], draft["profile_by"]) == ("draft", "chain", "draft")
    assert any("prefix_cache" in (row["dropped"] or "") for row in draft["candidates"])


def test_a_plain_body_is_enough(gate: Gateway) -> None:
    status, found = gate.admin("POST", "/explain", {"model": MODEL, "messages": [{"role": "user", "content": "x"}]})
    assert (status, found["prompt_chars"]) == (200, 1)


@pytest.mark.slow
def test_who_is_down_or_filtered_is_said(gate: Gateway) -> None:
    found = explain(gate, headers={"external-filter": "gpu=h100"})
    assert found["worker"] is None
    assert "gpu=h100" in found["reason"]
    assert {row["dropped"] for row in found["candidates"]} == {"label filter: gpu=h100"}
    with launch_engines(1) as extra:
        gate.add_worker(extra[0].url)
    gate.wait_until("it is down", lambda: not is_healthy(gate, extra[0].url))
    found = explain(gate)
    assert {row["worker"]: row["dropped"] for row in found["candidates"]}[extra[0].url] == "not healthy"
    gate.admin("DELETE", f"/workers/{extra_id(gate, extra[0].url)}")


def test_who_was_never_healthy_is_said(gate: Gateway) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert gate.admin("POST", "/workers", {"url": url, "models": [MODEL]})[0] == 202
        found = explain(gate)
        gate.admin("DELETE", f"/workers/{extra_id(gate, url)}")
    assert {row["worker"]: row["dropped"] for row in found["candidates"]}[url] == "not healthy yet"


def extra_id(gate: Gateway, url: str) -> str:
    return str(next(worker["id"] for worker in gate.workers() if worker["url"] == url))


def is_healthy(gate: Gateway, url: str) -> bool:
    return any(worker["url"] == url and worker["is_healthy"] for worker in gate.workers())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"request": 7}, 400, "request"),
        ({"request": {}, "profile": "nobody"}, 404, "nobody"),
        ({"request": {}, "profile": {"routingStrategy": "nonsense"}}, 400, "profile.routingStrategy"),
        ({"request": {}, "profile": {"routingStrategy": "least-reqest"}}, 400, "(did you mean 'least_request'?"),
        ({"request": {}, "profile": {"cache_aware": {"cache_threshold": 3}}}, 400, "cache_threshold"),
        ({"request": {}, "extra": 1}, 400, "extra"),
        ({"request": {}, "headers": {"routing-strategy": "nonsense"}}, 400, "nonsense"),
        ({"request": {}, "headers": {"x-smg-target-worker": "x"}}, 400, "position"),
        ([], 400, ""),
    ],
)
def test_bad_questions_are_told_what_is_wrong(gate: Gateway, body: Any, status: int, words: str) -> None:
    found = gate.admin("POST", "/explain", body)
    assert found[0] == status
    assert words in found[1]["error"]


def test_decisions_are_kept(gate: Gateway) -> None:
    request_id = ask(gate, prompt_text("one that is looked up", 3000))
    status, found = gate.admin("GET", f"/decisions/{request_id}")
    assert status == 200
    assert (found["id"], found["status"], found["prompt_tokens"], found["output_tokens"]) == (request_id, 200, 750, 4)
    assert found["worker"] in {worker["url"] for worker in gate.workers()}
    assert 0 < found["ttft_s"] <= found["total_s"]
    assert found["engine_prompt_tokens"] > 0
    assert found["explanation"]["better"] == "least"
    latest = gate.admin("GET", "/decisions?limit=1")[1]["decisions"]
    assert [row["group"] for row in latest] == [found["group"]]
    of_it = gate.admin("GET", f"/decisions?limit=5&worker={found['worker_id']}")[1]["decisions"]
    assert {row["worker"] for row in of_it} == {found["worker"]}
    status, missing = gate.admin("GET", "/decisions/nothing-like-it")
    assert (status, missing["code"]) == (404, "DECISION_NOT_FOUND")
    assert "before it has ended" in missing["error"]
    assert gate.admin("GET", "/decisions?limit=0")[0] == 400
    status, misspelt = gate.admin("GET", "/decisions?limt=3")
    assert (status, misspelt["error"]) == (400, "unknown parameter 'limt'. did you mean 'limit'?")


def test_why_tells_shares_groups_and_predictions(gate: Gateway) -> None:
    for _ in range(25):
        ask(gate, prompt_text("a hot prompt", 5000))
    url = gate.admin("GET", "/decisions?limit=1")[1]["decisions"][0]["worker"]
    worker = extra_id(gate, url)
    status, found = gate.admin("GET", f"/workers/{worker}/why?last=5m")
    assert status == 200
    assert found["requests"] >= 20
    assert sum(found["reasons"].values()) == pytest.approx(1, abs=0.01)
    assert found["reasons"]["prefix"] > 0.5
    assert found["top_groups"][0]["share"] > 0.5
    assert found["ttft"]["measured"] >= 20
    assert found["cache"]["engine_share"] > 0.5
    assert found["is_covered"]
    assert any("one prefix makes up" in line for line in found["advice"])
    command = [sys.executable, "-m", "pointsman.daemon.main", "workers", "why", worker, "--last", "5m"]
    command += ["--admin", f"unix:{gate.socket_path}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "prefix groups" in shown.stdout
    assert "->" in shown.stdout
    assert gate.admin("GET", f"/workers/{worker}/why?last=soon")[0] == 400
    assert gate.admin("GET", f"/workers/{worker}/why?lst=5m")[0] == 400
    assert gate.admin("GET", "/workers/nobody/why")[0] == 404
