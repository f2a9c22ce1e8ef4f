"""Prefill/decode pairs as an operator runs them: flags, readiness per role, drains that wait, fleets of one and one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest

from pointsman.scripts.simulated_engine.text import generate_output
from tests.e2e.test_fanout import asked
from tests.e2e.test_fanout_on_data_port import bearer, wire
from tests.fakes.edits import write_and_rename
from tests.fakes.gateway import Gateway, gateway, session
from tests.fakes.pair_engines import PairFleet, pair_fleet
from tests.fakes.traffic import Client, client_of_each
from tests.fakes.traffic import request as post

PROMPT = "a prompt of several blocks " * 40


@pytest.fixture(scope="module")
def fleet() -> Iterator[PairFleet]:
    with pair_fleet(1, 1) as running:
        yield running


@pytest.fixture(autouse=True)
def healed(fleet: PairFleet) -> Iterator[None]:
    yield
    asyncio.run(fleet.reset())


def ask(gate: Gateway, path: str = "/v1/completions", body: Any = None) -> tuple[int, Any]:
    request = urllib.request.Request(f"{gate.url}{path}", None if body is None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def completion(prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    return {"model": "sim-model", "prompt": prompt, "max_tokens": 6, **fields}


def right(prompt: str = PROMPT) -> str:
    return "".join(generate_output(prompt.encode(), 6))


@pytest.mark.parametrize("flavor", ["sglang", "vllm"])
def test_a_pair_answers_what_one_engine_would(flavor: str) -> None:
    flags = ["--vllm-pd-disaggregation"] if flavor == "vllm" else ["--pd-disaggregation"]
    with pair_fleet(1, 1, flavor=flavor) as fleet, gateway(*fleet.flags, *flags) as gate:
        gate.wait_healthy(2)
        status, answer = ask(gate, body=completion())
        assert (status, answer["choices"][0]["text"]) == (200, right())
        states = asyncio.run(fleet.states())
        assert [state["inference_requests_total"] for state in states] == [1, 1]
        assert [state["transfers"]["transfers_failed"] for state in states] == [0, 0]
        # counted a moment after the answer is written
        gate.wait_until("it is counted", lambda: gate.metrics()["pointsman_pair_transfer_seconds_count"] == 1)
        metrics = gate.metrics()
        assert metrics['pointsman_pair_requests_total{leg="prefill"}'] == 1
        assert metrics['pointsman_pair_requests_total{leg="decode"}'] == 1
        assert metrics["pointsman_pair_prefill_seconds_count"] == 1
        assert not any(value for name, value in metrics.items() if name.startswith("pointsman_pair_errors_total"))
        line = gate.wait_log("request", path="/v1/completions")
        assert (line["worker"], line["prefill"]) == (fleet.decodes[0].url, fleet.prefills[0].url)
        assert 0 <= line["prefill_ms"] + line["transfer_ms"] <= line["total_ms"]
        # what the engines refuse of each other would be no 200
        status, answer = ask(gate, "/health_generate")
        assert (status, len(answer["choices"])) == (200, 1)
        states = asyncio.run(fleet.states())
        assert [state["inference_requests_total"] for state in states] == [2, 2]
        line = gate.wait_log("request", path="/health_generate")
        assert (line["method"], line["status"], line["prefill"]) == ("GET", 200, fleet.prefills[0].url)


def test_who_would_be_paired_and_why(fleet: PairFleet) -> None:
    with gateway(*fleet.flags, "--decode", "http://127.0.0.1:9") as gate:
        gate.wait_healthy(2)
        _, told = gate.admin("POST", "/explain", {"request": completion()})
        prefill, decode = fleet.prefills[0].url, fleet.decodes[0].url
        assert (told["worker"], told["decode"]["worker"]) == (prefill, decode)
        assert {row["worker"]: row["dropped"] for row in told["decode"]["candidates"]} == {
            decode: None,
            "http://127.0.0.1:9": "not healthy yet",
            prefill: "a prefill worker",
        }
        asked = urllib.request.Request(f"{gate.url}/v1/completions", json.dumps(completion()).encode())
        asked.add_header("X-Pointsman-Explain", "1")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            found = json.loads(answer.headers["X-Pointsman-Decision"])
            assert answer.headers.get_all("X-Pointsman-Prefill-Worker") == [told["worker_id"]]
        assert (found["worker"], found["decode_worker"]) == (prefill, decode)


def test_readiness_needs_both_roles(fleet: PairFleet) -> None:
    with gateway() as gate:
        prefill, decode = fleet.prefills[0], fleet.decodes[0]
        gate.add_worker(prefill.url, worker_type="prefill", bootstrap_port=prefill.bootstrap_port)
        gate.wait_healthy(1)
        assert ask(gate, "/readiness")[0] == 503
        status, answer = ask(gate, body=completion())
        assert status == 503
        assert "no decode worker is configured" in answer["error"]["message"]
        gate.add_worker(decode.url, worker_type="decode")
        gate.wait_healthy(2)
        assert ask(gate, "/readiness")[0] == 200
        assert ask(gate, body=completion())[1]["choices"][0]["text"] == right()


def test_the_last_of_a_role_is_never_kept_out(fleet: PairFleet) -> None:
    """A fleet of one and one under bursts of 429 and 503: it goes on serving, whatever its breakers say."""
    flags = ("--cb-failure-threshold", "3", "--retry-max-retries", "4", "--retry-initial-backoff-ms", "1")
    with gateway(*fleet.flags, *flags) as gate:
        gate.wait_healthy(2)
        for engine, status in ((fleet.prefills[0], 503), (fleet.decodes[0], 429), (fleet.prefills[0], 429)):
            asyncio.run(fleet.arm(engine, {"kind": "status", "status": status, "times": 12}))
            seen = Counter(ask(gate, body=completion())[0] for _ in range(20))
            print(f"\n{status}: {seen}")
            assert seen[200] >= 10, "it serves again as soon as the engine does"
            assert set(seen) <= {200, status}
        asyncio.run(fleet.arm(fleet.prefills[0]))
        assert ask(gate, body=completion())[1]["choices"][0]["text"] == right()


def test_a_prefill_worker_without_a_bootstrap_port(fleet: PairFleet) -> None:
    """`none`: the engines know the port, the request says null."""
    port = fleet.prefills[0].bootstrap_port
    with pair_fleet(0, 1, "--bootstrap-port", str(port)) as other:
        decode, prefill = other.decodes[0].url, fleet.prefills[0].url
        with gateway("--prefill", prefill, "none", "--decode", decode) as gate:
            gate.wait_healthy(2)
            assert ask(gate, body=completion())[1]["choices"][0]["text"] == right()
            assert {worker["bootstrap_port"] for worker in gate.workers()} == {None}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--prefill", "http://127.0.0.1:1@0"), "data-parallel ranks (URL@RANK) are not addressed"),
        (("--decode", "http://127.0.0.1:1@7"), "name the engine once, without @RANK"),
        (("--dp-aware",), "data-parallel ranks (URL@RANK) are not addressed"),
        (("--prefill", "9001"), "the port 9001 follows no URL"),
        (("--prefill", "http://127.0.0.1:1", "99999"), "expected URL#PORT"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(flags: tuple[str, ...], why: str) -> None:
    command = [sys.executable, "-m", "pointsman.daemon.main", "serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 64
    assert why in done.stderr


def test_ranks_are_refused_by_the_admin_api_and_in_files(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    path.write_text(json.dumps({"workers": [{"url": "http://127.0.0.1:1@0", "worker_type": "prefill"}]}))
    command = [sys.executable, "-m", "pointsman.daemon.main", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "workers[0].url" in done.stdout + done.stderr
    assert "ranks (URL@RANK) are not addressed" in done.stdout + done.stderr
    with gateway() as gate:
        status, answer = gate.admin("POST", "/workers", {"url": "http://127.0.0.1:1@0", "worker_type": "decode"})
        assert status == 400
        assert "ranks (URL@RANK) are not addressed" in json.dumps(answer)


def test_fan_outs_reach_both_roles(fleet: PairFleet) -> None:
    """Whichever shard is asked."""
    with gateway(*fleet.flags, "--admin-on-data-port") as gate:
        gate.wait_healthy(2)
        assert ask(gate, body=completion())[0] == 200
        both = [engine.url for engine in fleet.engines]
        before = [asked(url, "/flush_cache") for url in both]
        with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
            assert len(clients) == 2
            for client in clients.values():
                flushed = client.ask(wire("POST", "/flush_cache", headers=bearer(gate.token)))
                assert (flushed.status, sorted(flushed.json["succeeded"])) == (200, sorted(both))
                loads = client.ask(wire("GET", "/get_loads", headers=bearer(gate.token)))
                assert loads.status == 200
                assert {worker["worker"] for worker in loads.json["workers"]} == set(both)
        assert [asked(url, "/flush_cache") for url in both] == [count + 2 for count in before]


@contextmanager
def pair_in_a_file(fleet: PairFleet, *flags: str) -> Iterator[tuple[Gateway, Path]]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "workers.json")
        prefill, decode = fleet.prefills[0], fleet.decodes[0]
        entries = [
            {"url": prefill.url, "worker_type": "prefill", "bootstrap_port": prefill.bootstrap_port},
            {"url": decode.url, "worker_type": "decode"},
        ]
        path.write_text(json.dumps({"workers": entries}))
        with gateway("--workers-file", str(path), *flags) as gate:
            gate.wait_healthy(2)
            yield gate, path


@pytest.mark.parametrize(
    "how",
    ["deleted", *(pytest.param(how, marks=pytest.mark.slow) for how in ("taken out of workers.json", "drained"))],
)
def test_a_prefill_worker_is_not_removed_while_decode_has_to_fetch_from_it(fleet: PairFleet, how: str) -> None:
    """Its load is over, but its KV is still wanted."""
    prefill, decode = fleet.prefills[0], fleet.decodes[0]
    asyncio.run(fleet.arm(decode, {"kind": "hang", "seconds": 2.0, "after_bytes": 0}))
    with ExitStack() as stack:
        if how == "taken out of workers.json":
            gate, path = stack.enter_context(pair_in_a_file(fleet))
        else:
            gate, path = stack.enter_context(gateway(*fleet.flags)), None
            gate.wait_healthy(2)
        found: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: found.append(ask(gate, body=completion())))
        asking.start()
        worker = gate.wait_until("a hold", lambda: next((w for w in gate.workers() if w["holds"]), None))
        assert worker is not None
        assert (worker["worker_type"], worker["in_flight"]) == ("prefill", 0)
        if path is not None:
            left = {"workers": [{"url": decode.url, "worker_type": "decode"}]}
            write_and_rename(path, json.dumps(left).encode())
        elif how == "deleted":
            assert gate.admin("DELETE", f"/workers/{worker['id']}")[0] == 202
        else:
            assert gate.admin("POST", f"/workers/{worker['id']}/drain")[0] == 202
        asking.join(30)
        assert [status for status, _ in found] == [200]
        gone = gate.wait_log("worker_drained", worker=prefill.url) if how == "drained" else gate.wait_log("worker_gone")
        assert gone["ts"] >= gate.wait_log("request", path="/v1/completions")["ts"]


def test_a_prefill_worker_is_removed_when_the_lease_is_over(fleet: PairFleet) -> None:
    """Whatever decode does: the engine has given the KV up."""
    asyncio.run(fleet.arm(fleet.decodes[0], {"kind": "hang", "after_bytes": 0}))
    with gateway(*fleet.flags, "--kv-lease-s", "0.3") as gate, Client((gate.host, gate.port)) as client:
        gate.wait_healthy(2)
        client.sock.sendall(post(completion(), "/v1/completions"))
        lease_end = 'pointsman_pair_events_total{event="lease_end"}'
        gate.wait_until("the lease is over", lambda: gate.metrics()[lease_end] == 1)
        (worker,) = (one for one in gate.workers() if one["worker_type"] == "prefill")
        assert gate.admin("DELETE", f"/workers/{worker['id']}")[0] == 202
        gate.wait_log("worker_gone")
        (decode,) = gate.workers()
        assert (decode["worker_type"], decode["in_flight"]) == ("decode", 1)


def test_input_logprobs_come_from_prefill(fleet: PairFleet) -> None:
    """Plain, in a batch, and in every event of a stream."""
    with gateway(*fleet.flags) as gate:
        gate.wait_healthy(2)
        body = {"text": "a b c d", "sampling_params": {"max_new_tokens": 3}, "return_logprob": True}
        _, answer = ask(gate, "/generate", body)
        assert len(answer["meta_info"]["input_token_logprobs"]) == 2
        _, answers = ask(gate, "/generate", {**body, "text": ["a b c d", "e f g h i"]})
        assert [len(one["meta_info"]["input_token_logprobs"]) for one in answers] == [2, 3]
        request = urllib.request.Request(f"{gate.url}/generate", json.dumps({**body, "stream": True}).encode())
        with urllib.request.urlopen(request, timeout=30) as streamed:
            events = [json.loads(line[6:]) for line in streamed.read().splitlines() if line.startswith(b"data: {")]
        assert len(events) == 3
        assert {len(one["meta_info"]["input_token_logprobs"]) for one in events} == {2}
        assert events[-1]["text"] == answer["text"]


async def ask_many(gate: Gateway, count: int) -> Counter[tuple[int, bool]]:
    """(status, whether the text is right) of so many requests, eight at a time."""
    gates = asyncio.Semaphore(8)

    async def one(client: aiohttp.ClientSession, number: int) -> tuple[int, bool]:
        prompt = f"request {number} {PROMPT}"
        async with gates, client.post(f"{gate.url}/v1/completions", json=completion(prompt)) as answer:
            document = await answer.json()
            return answer.status, answer.status == 200 and document["choices"][0]["text"] == right(prompt)

    async with session() as client:
        return Counter(await asyncio.gather(*(one(client, number) for number in range(count))))


def test_engines_that_never_forget_a_failed_session() -> None:
    """One transfer fails, then all between these two engines do: the pair is left alone, nobody is charged."""
    with pair_fleet(2, 2, "--sticky-sessions") as fleet, gateway(*fleet.flags, "--decode-policy", "random") as gate:
        gate.wait_healthy(4)
        assert asyncio.run(ask_many(gate, 40)) == {(200, True): 40}
        asyncio.run(fleet.arm(fleet.decodes[0], {"kind": "transfer_error", "times": 1}))
        assert asyncio.run(ask_many(gate, 120)) == {(200, True): 120}
        metrics = gate.metrics()
        assert metrics['pointsman_pair_events_total{event="ban"}'] >= 1
        assert {worker["breaker"]["state"] for worker in gate.workers()} == {"closed"}
        failed = sum(value for name, value in metrics.items() if name.startswith("pointsman_pair_errors_total"))
        assert asyncio.run(ask_many(gate, 40)) == {(200, True): 40}
        after = sum(value for name, value in gate.metrics().items() if name.startswith("pointsman_pair_errors_total"))
        assert after == failed, "the banned pair is not tried again"


@pytest.mark.slow
def test_a_room_that_never_matches() -> None:
    """Neither engine says anything for minutes; the request goes to another pair after `first_token_s`."""
    with TemporaryDirectory() as folder, pair_fleet(2, 2) as fleet:
        profiles = Path(folder) / "profiles.json"
        profiles.write_text(json.dumps({"profiles": {"default": {"timeouts": {"first_token_s": 0.5}}}}))
        with gateway(*fleet.flags, "--profiles", str(profiles)) as gate:
            gate.wait_healthy(4)
            for decode in fleet.decodes:
                asyncio.run(fleet.arm(decode, {"kind": "room_lost", "times": 1}))
            body = json.dumps(completion(stream=True)).encode()
            with urllib.request.urlopen(urllib.request.Request(f"{gate.url}/v1/completions", body), timeout=30) as one:
                assert b"[DONE]" in one.read()
            assert {worker["breaker"]["state"] for worker in gate.workers()} == {"closed"}


def test_vllm_prefill_that_dies_between_the_legs() -> None:
    """Decode cannot fetch and says 500: the client gets the right text from another full pair."""
    with pair_fleet(2, 1, flavor="vllm") as fleet, gateway(*fleet.flags, "--vllm-pd-disaggregation") as gate:
        gate.wait_healthy(3)
        asyncio.run(fleet.arm(fleet.decodes[0], {"kind": "transfer_error", "times": 2}))
        assert asyncio.run(ask_many(gate, 20)) == {(200, True): 20}
        assert {worker["breaker"]["state"] for worker in gate.workers()} == {"closed"}


@pytest.mark.slow
def test_vllm_serves_on_when_its_only_prefill_worker_is_killed() -> None:
    """Decode computes the prompts itself, unless that is switched off; readiness still asks for both roles."""
    with pair_fleet(1, 1, flavor="vllm") as fleet, ExitStack() as stack:
        flags = (*fleet.flags, "--vllm-pd-disaggregation")
        gate = stack.enter_context(gateway(*flags))
        strict = stack.enter_context(gateway(*flags, "--no-pd-decode-without-prefill"))
        for each in (gate, strict):
            each.wait_healthy(2)
        os.kill(fleet.prefills[0].pid, signal.SIGKILL)
        assert asyncio.run(ask_many(gate, 20)) == {(200, True): 20}
        assert gate.metrics()['pointsman_pair_events_total{event="decode_alone"}'] == 20
        assert ask(gate, "/readiness")[0] == 503
        assert ask(strict, body=completion())[0] in (502, 503)
