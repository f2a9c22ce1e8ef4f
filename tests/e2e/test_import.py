"""Documented command lines of other routers, imported: the gateway that starts from the files does what they ask."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from pointsman.scripts.simulated_engine.text import generate_output
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.pair_engines import pair_fleet
from tests.fakes.prompts import prompt_text, shaped
from tests.fakes.traffic import Client, completion

SGLANG = ("python", "-m", "sglang_router.launch_router")
VLLM = ("vllm-router",)
LOCAL = ("--host", "127.0.0.1", "--prometheus-host", "127.0.0.1", "--prometheus-port", "0")
KEY = "sk-of-the-old-router"
EXIT_NOT_EQUIVALENT = 1


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--flavor", "sglang") as running:
        yield [engine.url for engine in running]


def run_import(folder: Path, router: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pointsman.daemon.main", "import", router, "--into", str(folder), "--", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@contextmanager
def imported(folder: Path, router: str, *argv: str, workers: Sequence[str]) -> Iterator[Gateway]:
    """A gateway of two shards that runs by the files, and by nothing else but the ports of tests."""
    done = run_import(folder, router, [*argv, "--worker-urls", *workers, *LOCAL])
    assert done.returncode == 0, done.stdout + done.stderr
    with gateway("--config", str(folder / "pointsman.toml")) as gate:
        gate.wait_healthy(len(workers))
        yield gate


def ask(gate: Gateway, prompt: str, headers: Mapping[str, str] | None = None, **fields: Any) -> str:
    """The worker that answered."""
    with Client((gate.host, gate.port)) as client:
        reply = client.ask(shaped("prompt string", prompt, dict(headers or {}), max_tokens=1, **fields))
    assert reply.status == 200, reply
    return str(reply.headers["x-smg-routed-worker-id"])


def workers_of(gate: Gateway, count: int, headers: Mapping[str, str] | None = None, name: str = "") -> list[str]:
    return [ask(gate, prompt_text(f"{name} {number}"), headers) for number in range(count)]


def policy_of(gate: Gateway) -> str:
    """As it is told to a client that asks for nothing."""
    with Client((gate.host, gate.port)) as client:
        return str(client.ask(completion()).headers["routing-strategy"])


def test_round_robin_in_declaration_order(engines: list[str], tmp_path: Path) -> None:
    with imported(tmp_path, "sglang-router", *SGLANG, "--policy", "round_robin", workers=engines) as gate:
        found = workers_of(gate, 6)
        assert found in ([*engines] * 3, [*reversed(engines)] * 3)
        assert policy_of(gate) == "round_robin"


@pytest.mark.parametrize("policy", ["random", "power_of_two"])
def test_chance_reaches_everybody(engines: list[str], tmp_path: Path, policy: str) -> None:
    with imported(tmp_path, "sglang-router", "sglang-router", "--policy", policy, workers=engines) as gate:
        assert set(workers_of(gate, 40)) == set(engines)  # missed once in 10**12
        assert policy_of(gate) == policy


def test_cache_aware_is_the_policy_of_who_names_none(engines: list[str], tmp_path: Path) -> None:
    line: tuple[str, ...] = (
        *SGLANG,
        "--cache-threshold",
        "0.5",
        "--balance-abs-threshold",
        "32",
        "--balance-rel-threshold",
        "1.5",
    )
    line += ("--eviction-interval-secs", "120", "--max-tree-size", "67108864")
    with imported(tmp_path, "sglang-router", *line, workers=engines) as gate:
        first = {name: ask(gate, prompt_text(name)) for name in "abcdef"}
        for _ in range(3):
            assert {name: ask(gate, prompt_text(name)) for name in first} == first
        assert policy_of(gate) == "cache_aware"


@pytest.mark.parametrize(
    ("router", "line", "header"),
    [
        ("sglang-router", ("smg", "launch", "--policy", "consistent_hashing"), "X-SMG-Routing-Key"),
        ("sglang-router", (*SGLANG, "--policy", "manual", "--assignment-mode", "min_load"), "X-SMG-Routing-Key"),
        ("sglang-router", (*SGLANG, "--policy", "random", "--routing-key-override"), "X-SMG-Routing-Key"),
        ("vllm-router", (*VLLM, "--policy", "consistent_hash"), "X-Session-ID"),
        ("vllm-router", (*VLLM, "--policy", "sticky_least_loaded"), "X-Session-ID"),
    ],
)
def test_sessions_stay_where_they_are(
    engines: list[str], tmp_path: Path, router: str, line: tuple[str, ...], header: str
) -> None:
    with imported(tmp_path, router, *line, workers=engines) as gate:
        used = set()
        for session in range(12):
            found = set(workers_of(gate, 4, {header: f"session-{session}"}, f"{session}"))
            assert len(found) == 1
            used |= found
        assert used == set(engines)


def test_a_target_worker_is_named_by_its_position(engines: list[str], tmp_path: Path) -> None:
    line = (*SGLANG, "--policy", "consistent_hashing")
    with imported(tmp_path, "sglang-router", *line, workers=engines) as gate:
        for position, url in enumerate(engines):
            assert set(workers_of(gate, 4, {"X-SMG-Target-Worker": str(position)})) == {url}


def test_the_same_head_of_a_prompt_goes_to_the_same_worker(engines: list[str], tmp_path: Path) -> None:
    line = (*SGLANG, "--policy", "prefix_hash", "--prefix-token-count", "128")
    with imported(tmp_path, "sglang-router", *line, workers=engines) as gate:
        heads = [prompt_text(f"head {number}", 4096) for number in range(8)]
        found = [{ask(gate, f"{head} and tail {tail}") for tail in range(3)} for head in heads]
        assert all(len(workers) == 1 for workers in found)
        assert policy_of(gate) == "prefix_hash"


def test_limits_probes_metrics_and_names(engines: list[str], tmp_path: Path) -> None:
    line: tuple[str, ...] = (
        *SGLANG,
        "--max-concurrent-requests",
        "64",
        "--queue-size",
        "128",
        "--queue-timeout-secs",
        "30",
    )
    line += ("--retry-max-retries", "3", "--cb-failure-threshold", "5", "--cb-timeout-duration-secs", "30")
    line += ("--health-check-interval-secs", "10", "--health-failure-threshold", "2", "--log-level", "info")
    with imported(tmp_path, "sglang-router", *line, workers=engines) as gate:
        admission = gate.admin("GET", "/status")[1]["admission"]
        assert (admission["max_concurrent_requests"], admission["queue_size"]) == (64, 128)
        ask(gate, "count me")
        (metrics,) = gate.wait_log("ready")["metrics"]
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        assert 'sgl_router_requests_total{route="/v1/completions"} 1.0' in text
        assert "smg_worker_pool_size" in text
        with urllib.request.urlopen(f"{gate.url}/v1/models", timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "sim-model"
        flush = urllib.request.Request(f"{gate.url}/flush_cache", method="POST")
        flush.add_header("Authorization", f"Bearer {gate.token}")
        with urllib.request.urlopen(flush, timeout=30) as answer:
            assert json.load(answer)["workers_flushed"] == 2, "where its clients look for it"


def test_the_key_lets_in_and_reaches_the_engines(tmp_path: Path) -> None:
    with launch_engines(1, "--flavor", "sglang") as running:
        url = running[0].url
        with imported(tmp_path, "sglang-router", *SGLANG, "--api-key", KEY, workers=[url]) as gate:
            assert ask(gate, "x", {"Authorization": f"Bearer {KEY}"}) == url
            with Client((gate.host, gate.port)) as client:
                assert client.ask(completion()).status == 401
        with urllib.request.urlopen(f"{url}/_sim/state", timeout=30) as answer:
            requests = json.load(answer)["requests"]
    headers = {name.lower(): value for name, value in requests[-1]["headers"]}
    assert headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("router", "start", "flavor"),
    [
        ("sglang-router", (*SGLANG, "--pd-disaggregation"), "sglang"),
        ("vllm-router", (*VLLM, "--vllm-pd-disaggregation", "--kv-connector", "nixl"), "vllm"),
    ],
)
def test_pairs(tmp_path: Path, router: str, start: tuple[str, ...], flavor: str) -> None:
    """Each side by its own policy: a session stays with its prefill worker, decode workers take turns."""
    with pair_fleet(2, 2, flavor=flavor) as fleet:
        line = [*start, "--prefill-policy", "consistent_hash", "--decode-policy", "round_robin", "--policy", "random"]
        line[line.index("consistent_hash")] += "ing" if router == "sglang-router" else ""
        for one in fleet.prefills:
            line += ["--prefill", one.url, *([str(one.bootstrap_port)] if flavor == "sglang" else [])]
        for one in fleet.decodes:
            line += ["--decode", one.url]
        done = run_import(tmp_path, router, [*line, *LOCAL])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "unsupported" not in done.stdout
        with gateway("--config", str(tmp_path / "pointsman.toml")) as gate:
            gate.wait_healthy(4)
            used = Counter[tuple[str, str]]()
            for number in range(24):
                session = {"X-SMG-Routing-Key": f"session-{number % 6}"}
                prompt = prompt_text(f"turn {number}")
                with Client((gate.host, gate.port)) as client:
                    reply = client.ask(shaped("prompt string", prompt, session, max_tokens=4))
                assert reply.status == 200, reply
                expected = "".join(generate_output(prompt.encode(), 4))
                assert reply.json["choices"][0]["text"] == expected
                used[session["X-SMG-Routing-Key"], str(reply.headers["x-pointsman-prefill-worker"])] += 1
                used["decode", str(reply.headers["x-pointsman-worker"])] += 1
            of_decode = {pair: count for pair, count in used.items() if pair[0] == "decode"}
            assert sorted(of_decode.values()) == [12, 12]
            assert len(used) - len(of_decode) == 6, "one prefill worker a session"


@pytest.mark.parametrize(
    ("router", "line"),
    [
        ("sglang-router", (*SGLANG, "--service-discovery", "--selector", "app=sglang-worker", "role=inference")),
        ("vllm-router", (*VLLM, "--vllm-pd-disaggregation", "--kv-connector", "nixl", "--vllm-discovery-address", "x")),
    ],
)
def test_what_is_not_to_be_had_is_said(tmp_path: Path, router: str, line: tuple[str, ...]) -> None:
    done = run_import(tmp_path, router, [*line, *LOCAL])
    assert done.returncode == EXIT_NOT_EQUIVALENT
    assert "NOT THE SAME" in done.stdout
    with gateway("--config", str(tmp_path / "pointsman.toml")) as gate:
        assert gate.workers() == []
