"""API keys in front of real engines, two shards: who gets in, what a key may do, and edits of the file under load."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, NotFoundError, OpenAI, PermissionDeniedError
from openai.types import Batch

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.batches import client_of
from tests.fakes.edits import EDITS, Edit, write_and_rename
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.scripted_worker import ScriptedWorker
from tests.fakes.traffic import Client, Reply, Traffic, client_of_each, request

EDITS_UNDER_LOAD = 40
MODEL = "sim-model"


def secret(name: str) -> str:
    return f"sk-test-{name}-0123456789"


def entry(name: str, **fields: Any) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(secret(name).encode()).hexdigest(), **fields}


def keys(*names: str, **entries: dict[str, Any]) -> bytes:
    """`names`: keys that may do everything."""
    by_name = {name: entry(name) for name in names} | {name: entry(name, **more) for name, more in entries.items()}
    return json.dumps({"keys": by_name}, indent=1).encode()


def ask(name: str | None = None, path: str = "/v1/completions", model: str = MODEL, **headers: str) -> bytes:
    shown = {} if name is None else {"Authorization": f"Bearer {secret(name)}"}
    fields = {header.replace("_", "-"): value for header, value in headers.items()}
    return request({"model": model, "prompt": "count", "max_tokens": 1}, path, shown | fields)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--model", MODEL) as running:
        yield [engine.url for engine in running]


@contextmanager
def clients_of(gate: Gateway) -> Iterator[list[Client]]:
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as found:
        yield list(found.values())


def on_each_shard(gate: Gateway, wire: bytes) -> list[Reply]:
    with clients_of(gate) as clients:
        return [client.ask(wire) for client in clients]


def code(reply: Reply) -> str:
    return str(reply.json["error"]["code"])


# --- who gets in


def test_without_a_good_key_nobody_gets_in(engines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a"))
    with gateway("--api-key-file", str(path), workers=engines) as gate:
        for wire in (ask(), ask("wrong"), ask(x_api_key="sk-wrong"), ask(authorization="Basic YTpi")):
            for reply in on_each_shard(gate, wire):
                assert (reply.status, code(reply)) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.headers["connection"] == "close"
        for wire in (ask("a"), ask(x_api_key=secret("a")), ask("a", x_api_key="whatever")):
            assert [reply.status for reply in on_each_shard(gate, wire)] == [200, 200]
        with clients_of(gate) as clients:
            for client in clients:
                assert [client.get(path).status for path in ("/health", "/liveness", "/readiness")] == [200] * 3
                assert client.get("/v1/models").status == 401


def test_who_may_not_ask_sends_no_body(engines: list[str], tmp_path: Path) -> None:
    """401 comes with the head: nothing is buffered for strangers, and no `100 Continue` invites them."""
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a"))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\nExpect: 100-continue\r\n\r\n"
    with gateway("--api-key-file", str(path), workers=engines) as gate, Client((gate.host, gate.port)) as client:
        client.sock.sendall(head)
        assert client.read().status == 401
        assert client.read_to_end() == b""


def test_no_worker_ever_sees_a_clients_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a"))
    with ScriptedWorker() as worker, gateway("--api-key-file", str(path), workers=[worker.url]) as gate:
        wires = (ask("a"), ask(X_Api_Key=secret("a")), ask("a", x_api_key="more", connection="x-other, keep-alive"))
        for wire in wires:
            assert {reply.status for reply in on_each_shard(gate, wire)} == {200}
        seen = list(worker.requests.queue)
    assert sum(request.line.startswith(b"POST") for request in seen) == 2 * len(wires)
    for sent in seen:
        assert sent.all(b"authorization") == sent.all(b"x-api-key") == []
        assert secret("a") not in repr(sent)


def test_a_workers_own_key_is_sent_in_its_place(tmp_path: Path) -> None:
    path, workers = tmp_path / "keys.json", tmp_path / "workers.json"
    path.write_bytes(keys("a"))
    with ScriptedWorker() as worker:
        workers.write_text(json.dumps({"workers": [{"url": worker.url, "api_key": "sk-of-the-worker"}]}))
        with gateway("--api-key-file", str(path), "--workers-file", str(workers)) as gate:
            gate.wait_healthy(1)
            assert {reply.status for reply in on_each_shard(gate, ask("a"))} == {200}
        sent = [seen.all(b"authorization") for seen in worker.requests.queue if seen.line.startswith(b"POST")]
    assert sent == [[b"Bearer sk-of-the-worker"]] * 2


# --- what a key may do


def test_models_and_profiles(engines: list[str], tmp_path: Path) -> None:
    path, profiles = tmp_path / "keys.json", tmp_path / "profiles.json"
    path.write_bytes(keys("all", some={"models": ["sim-*"]}, other={"models": ["x"]}, bulk={"profiles": ["bulk"]}))
    profiles.write_text(json.dumps({"profiles": {"default": {}, "bulk": {"routingStrategy": "random"}}}))
    with gateway("--api-key-file", str(path), "--profiles", str(profiles), workers=engines) as gate:
        expected = {
            ask("all"): (200, ""),
            ask("some"): (200, ""),
            ask("some", model="gpt"): (403, "model_not_allowed"),
            ask("some", model=""): (403, "model_not_allowed"),
            ask("other"): (403, "model_not_allowed"),
            ask("bulk"): (403, "profile_not_allowed"),
            ask("bulk", config_profile="bulk"): (200, ""),
            ask("bulk", config_profile="default"): (403, "profile_not_allowed"),
            ask("bulk", config_profile="no-such"): (403, "profile_not_allowed"),
        }
        with clients_of(gate) as clients:
            for client in clients:
                for wire, (status, name) in expected.items():
                    reply = client.ask(wire)
                    assert (reply.status, "" if reply.status == 200 else code(reply)) == (status, name), wire
                listed = {}
                for key in ("all", "some", "other"):
                    head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nx-api-key: {secret(key)}\r\n\r\n"
                    listed[key] = [card["id"] for card in client.ask(head.encode()).json["data"]]
                assert listed == {"all": [MODEL], "some": [MODEL], "other": []}
                head = f"GET /v1/models/{MODEL} HTTP/1.1\r\nHost: x\r\nx-api-key: {secret('other')}\r\n\r\n"
                assert client.ask(head.encode()).status == 403


def test_a_form_with_several_models_needs_all_of_them(engines: list[str], tmp_path: Path) -> None:
    """One to be let in with, another one for the engine: which of them counts is the engine's to say."""
    path = tmp_path / "keys.json"
    path.write_bytes(keys(some={"models": [MODEL, "whisper"]}))

    def form(*models: str) -> bytes:
        fields = [f'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n' for model in models]
        audio = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--x--\r\n'
        body = "".join([*fields, audio])
        head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret('some')}\r\n"
        head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
        return (head + body).encode()

    with gateway("--api-key-file", str(path), workers=engines) as gate, clients_of(gate) as clients:
        forms = (form(MODEL), form(MODEL, "whisper"), form(MODEL, "gpt"), form("gpt", MODEL), form())
        answers = [clients[0].ask(wire).status for wire in forms]
    assert answers == [200, 200, 403, 403, 403]


def test_profiles_by_the_name_of_the_key(engines: list[str], tmp_path: Path) -> None:
    path, profiles = tmp_path / "keys.json", tmp_path / "profiles.json"
    path.write_bytes(keys("batch-1", "team"))
    rules = [{"profile": "bulk", "key": "batch-*"}, {"profile": "never", "key": "sk-*"}]
    names: dict[str, Any] = {name: {} for name in ("default", "bulk", "never")}
    profiles.write_text(json.dumps({"profiles": names, "match": rules}))
    with gateway("--api-key-file", str(path), "--profiles", str(profiles), workers=engines) as gate:
        assert [reply.profile for reply in on_each_shard(gate, ask("batch-1"))] == ["bulk", "bulk"]
        assert [reply.profile for reply in on_each_shard(gate, ask("team"))] == ["default", "default"]
        warnings = gate.admin("GET", "/config")[1]["warnings"]
        assert warnings == ["match[1].key: fits the name of no key in the key file"]
        body = {"request": {"model": MODEL, "prompt": "x"}, "headers": {"Authorization": f"Bearer {secret('batch-1')}"}}
        assert gate.admin("POST", "/explain", body)[1]["profile"] == "bulk"


def test_names_are_told_and_keys_are_not(engines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    in_clear = {"keys": {"clear": {"key": secret("clear")}, "hashed": entry("hashed", models=["x"])}}
    path.write_text(json.dumps(in_clear))
    path.chmod(0o600)
    with gateway("--api-key-file", str(path), "--log-level", "debug", workers=engines) as gate:
        assert {reply.status for reply in on_each_shard(gate, ask("clear"))} == {200}
        assert {reply.status for reply in on_each_shard(gate, ask("hashed"))} == {403}
        assert {reply.status for reply in on_each_shard(gate, ask("stranger"))} == {401}
        for status, name in ((200, "clear"), (403, "hashed")):
            assert gate.wait_log("request", status=status, key=name)["path"] == "/v1/completions"
        assert "key" not in gate.wait_log("request", status=401)
        metrics = gate.metrics()
        assert metrics['pointsman_key_requests_total{class="ok",key="clear"}'] == 2
        assert metrics['pointsman_key_requests_total{class="4xx",key="hashed"}'] == 2
        assert metrics['pointsman_key_tokens_total{key="clear",kind="output"}'] == 2
        assert metrics['pointsman_key_tokens_total{key="clear",kind="prompt"}'] > 0
        told = json.dumps([gate.admin("GET", where)[1] for where in ("/status", "/config", "/workers", "/metrics")])
        told += json.dumps(gate.admin("GET", "/decisions")[1])
        state = "".join(
            kept.read_bytes().decode("latin-1") for kept in (gate.folder / "state").rglob("*") if kept.is_file()
        )
    told += json.dumps(gate.log) + state
    for name in ("clear", "hashed", "stranger"):
        assert secret(name) not in told


# --- routing headers


def test_routing_headers_of_some(engines: list[str], tmp_path: Path) -> None:
    path, profiles = tmp_path / "keys.json", tmp_path / "profiles.json"
    path.write_bytes(keys("plain", may={"routing_headers": True}, may_not={"routing_headers": False}))
    profiles.write_text(json.dumps({"profiles": {"default": {}, "bulk": {"routingStrategy": "random"}}}))
    common = ("--api-key-file", str(path), "--profiles", str(profiles))
    steered = {"config_profile": "bulk", "routing_strategy": "round-robin", "x_pointsman_explain": "1"}
    with gateway(*common, "--routing-header-networks", "10.0.0.0/8", workers=engines) as gate:
        for name, profile in (("plain", "default"), ("may", "bulk"), ("may_not", "default")):
            for reply in on_each_shard(gate, ask(name, **steered)):
                assert (reply.status, reply.profile) == (200, profile)
                assert ("x-pointsman-decision" in reply.headers) is (name == "may")
                assert (reply.headers["routing-strategy"] == "round-robin") is (name == "may")
    with gateway(*common, "--routing-headers-denied", "refuse", workers=engines) as gate:
        for name, status in (("plain", 200), ("may", 200), ("may_not", 403)):
            assert {reply.status for reply in on_each_shard(gate, ask(name, **steered))} == {status}
        reply = on_each_shard(gate, ask("may_not", x_smg_target_worker="0"))[0]
        assert code(reply) == "routing_header_not_allowed"
        assert "x-smg-target-worker" in reply.json["error"]["message"]
        assert {reply.status for reply in on_each_shard(gate, ask("may_not", x_session_id="s"))} == {200}


# --- rates


def test_rates_of_keys_are_one_for_all_shards(engines: list[str], tmp_path: Path) -> None:
    path, profiles = tmp_path / "keys.json", tmp_path / "profiles.json"
    path.write_bytes(keys("free", few={"requests_per_minute": 6}, many={"requests_per_minute": 9}))
    profiles.write_text(json.dumps({"profiles": {"default": {"limits": {"key_requests_per_minute": 8}}}}))
    with gateway("--api-key-file", str(path), "--profiles", str(profiles), workers=engines) as gate:
        with clients_of(gate) as clients:

            def passed(name: str) -> int:
                return sum(client.ask(ask(name)).status == 200 for _ in range(6) for client in clients)

            # What the key says, else what the profile says of every key.
            assert {name: passed(name) for name in ("few", "many", "free")} == {"few": 6, "many": 9, "free": 8}
            reply = clients[0].ask(ask("few"))
            assert (reply.status, code(reply)) == (429, "rate_limited")
            assert reply.json["error"]["type"] == "rate_limit_error"
            assert "6 requests a minute" in reply.json["error"]["message"]
            assert 1 <= int(reply.headers["retry-after"]) <= 10
        generation = _generation(gate)
        write_and_rename(path, keys("free", few={"requests_per_minute": 6000}, many={}))
        gate.wait_until("the edit is in force", lambda: _generation(gate) > generation)
        assert {reply.status for reply in on_each_shard(gate, ask("few"))} == {200}
        assert gate.metrics()['pointsman_requests_refused_total{reason="rate"}'] == 6 + 3 + 4 + 1


def test_tokens_are_charged_as_they_turn_out(engines: list[str], tmp_path: Path) -> None:
    """A request that does not say how long its answer may be is feared to be long; what was too much comes back."""
    path = tmp_path / "keys.json"
    path.write_bytes(keys(short={"tokens_per_minute": 1000}, long={"tokens_per_minute": 1000}))

    def wire(name: str, prompt: str) -> bytes:
        return request({"model": MODEL, "prompt": prompt}, headers={"Authorization": f"Bearer {secret(name)}"})

    with gateway("--api-key-file", str(path), workers=engines) as gate, clients_of(gate) as clients:
        assert [client.ask(wire("short", "x")).status for client in clients * 10] == [200] * 20
        assert clients[0].ask(wire("long", "word " * 3200)).status == 200, "so long that it would never fit"
        replies = [client.ask(wire("long", "x")) for client in clients]
        assert [reply.status for reply in replies] == [429, 429]
        # paid for by the minute: four of them for four thousand tokens, the first is over with the request itself
        assert all(120 < int(reply.headers["retry-after"]) < 300 for reply in replies)
        assert clients[0].ask(wire("short", "x")).status == 200


# --- edits


@pytest.mark.slow
def test_edits_under_load(engines: list[str], tmp_path: Path) -> None:
    """Whoever was allowed before and after is never refused; who is not any more is, on every shard at once."""
    path = tmp_path / "keys.json"
    path.write_bytes(keys("stays", "hashed", "guest-0"))
    with ExitStack() as stack:
        gate = stack.enter_context(gateway("--api-key-file", str(path), workers=engines))
        address = (gate.host, gate.port)
        traffics = [
            stack.enter_context(Traffic(address, wire, connections=8))
            for wire in (ask("stays"), ask("hashed"), ask("stays", connection="close"))
        ]
        clients = stack.enter_context(clients_of(gate))
        for number in range(1, EDITS_UNDER_LOAD + 1):
            before, after = f"guest-{number - 1}", f"guest-{number}"
            generation = _generation(gate)
            EDITS[number % len(EDITS)](path, keys("stays", "hashed", after))
            gate.wait_until("the edit is in force", lambda g=generation: _generation(gate) > g)  # type: ignore[misc]
            # From the moment that it is published, all shards go by it.
            assert [client.ask(ask(after)).status for client in clients] == [200, 200]
            if number % 8 == 0:
                assert {reply.status for reply in on_each_shard(gate, ask(before))} == {401}
        reports = [traffic.stop() for traffic in traffics]
        for report in reports:
            assert report.failures == []
            assert report.answered > EDITS_UNDER_LOAD
    print(f"\n{EDITS_UNDER_LOAD} edits, {sum(report.answered for report in reports)} answers, none refused")


def _generation(gate: Gateway) -> int:
    return int(gate.admin("GET", "/config")[1]["generation"])


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
def test_a_deleted_key_ends_on_open_connections_too(engines: list[str], tmp_path: Path, edit: Edit) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a", "b"))
    with gateway("--api-key-file", str(path), workers=engines) as gate, clients_of(gate) as clients:
        assert [client.ask(ask("b")).status for client in clients] == [200, 200]
        generation = _generation(gate)
        edit(path, keys("a"))
        gate.wait_until("the edit is in force", lambda: _generation(gate) > generation)
        assert [client.ask(ask("b")).status for client in clients] == [401, 401]


BROKEN: dict[str, tuple[bytes, str, str]] = {
    "half written": (keys("a")[:40], ":", "not valid JSON"),
    "a hash that is none": (b'{"keys": {"a": {\n"sha256": "abc"}}}', ":2:1: keys.a.sha256:", "64 hexadecimal digits"),
    "a typo": (b'{"keys": {"a": {\n"sha265": "abc"}}}', ":2:1: keys.a.sha265:", "'sha256'"),
    "empty": (b"", ":1", "empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_changes_nothing(engines: list[str], tmp_path: Path, name: str) -> None:
    content, place, says = BROKEN[name]
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a"))
    with gateway("--api-key-file", str(path), workers=engines) as gate:
        write_and_rename(path, content)
        gate.wait_until("it is refused", lambda: not gate.admin("GET", "/config")[1]["last_reload_ok"])
        (message,) = gate.admin("GET", "/config")[1]["errors"]
        assert message.startswith(f"{path}{place}")
        assert says in message
        assert [reply.status for reply in on_each_shard(gate, ask("a"))] == [200, 200]
        path.unlink()
        gate.wait_until("it is missed", lambda: gate.admin("GET", "/config")[1]["errors"] == [f"{path}: no such file"])
        assert [reply.status for reply in on_each_shard(gate, ask("a"))] == [200, 200]
        assert [reply.status for reply in on_each_shard(gate, ask())] == [401, 401]
        write_and_rename(path, keys("b"))
        gate.wait_until("mended", lambda: gate.admin("GET", "/config")[1]["last_reload_ok"])
        assert [reply.status for reply in on_each_shard(gate, ask("a"))] == [401, 401]


@pytest.mark.parametrize("victim", ["shard", "control"])
def test_keys_outlive_every_process(engines: list[str], tmp_path: Path, victim: str) -> None:
    """Also when the file has become bad meanwhile: the successor gets what was in force."""
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a"))
    with gateway("--api-key-file", str(path), workers=engines) as gate:
        write_and_rename(path, b"{")
        gate.wait_until("it is refused", lambda: not gate.admin("GET", "/config")[1]["last_reload_ok"])
        before = gate.pids(victim)
        os.kill(before[0], signal.SIGKILL)
        gate.wait_until("a successor", lambda: _successor_is_ready(gate, victim, before))
        assert [reply.status for reply in on_each_shard(gate, ask("a"))] == [200, 200]
        assert [reply.status for reply in on_each_shard(gate, ask("b"))] == [401, 401]


def _successor_is_ready(gate: Gateway, victim: str, before: list[int]) -> bool:
    try:
        rows = gate.admin("GET", "/status")[1]["processes"]
    except OSError:  # control is the one that is gone
        return False
    rows = [row for row in rows if row["name"].startswith(victim)]
    return before[0] not in [row["pid"] for row in rows] and all(row["state"] == "ready" for row in rows)


def test_a_bad_file_at_the_start_is_no_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": {"a": {"sha256": "abc"}}}')
    gate = Gateway(tmp_path, ["--api-key-file", str(path)])
    assert gate.wait_ended(20) == 78
    gate.close()
    assert f"{path}:1:17: keys.a.sha256:" in gate.log_text()


# --- an unmodified client


def test_the_openai_sdk(engines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(keys("a", limited={"models": ["nothing"]}))
    with gateway("--api-key-file", str(path), workers=engines) as gate:
        client = partial(client_of, gate)

        def chat(client: OpenAI) -> str:
            message: Any = {"role": "user", "content": "count"}
            answer = client.chat.completions.create(model=MODEL, messages=[message], max_tokens=3)
            return answer.choices[0].message.content or ""

        good = client(secret("a"))
        assert chat(good)
        assert [model.id for model in good.models.list()] == [MODEL]
        stream = good.completions.create(model=MODEL, prompt="hello", max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        with pytest.raises(AuthenticationError) as wrong:
            chat(client("sk-wrong"))
        assert wrong.value.code == "invalid_api_key"
        with pytest.raises(PermissionDeniedError) as denied:
            chat(client(secret("limited")))
        assert (denied.value.code, denied.value.param) == ("model_not_allowed", "model")


# --- batches


def test_a_batch_may_what_its_key_may(engines: list[str], tmp_path: Path) -> None:
    """Offline too: its models, its counters; the files of others do not exist."""
    path = tmp_path / "keys.json"
    path.write_bytes(keys("b", a={"models": [MODEL]}))
    with gateway("--api-key-file", str(path), "--batch-store", "sqlite", workers=engines) as gate:
        gate.wait_log("batches_ready")
        ours, others = (OpenAI(base_url=f"{gate.url}/v1", api_key=secret(name), max_retries=0) for name in "ab")
        with ours, others:
            lines = [
                {
                    "custom_id": model,
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"model": model, "prompt": "x"},
                }
                for model in (MODEL, "gpt")
            ]
            data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            file = ours.files.create(file=("in.jsonl", data), purpose="batch")
            with pytest.raises(NotFoundError):
                others.files.retrieve(file.id)
            made = ours.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            batch = gate.wait_until("the batch is done", lambda: _final(ours, made.id), 30.0)
            assert batch is not None
            assert batch.request_counts is not None
            assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
            told = ours.files.content(batch.error_file_id or "").read()
            assert b"model_not_allowed" in told
        metrics = gate.metrics()
        assert metrics['pointsman_key_tokens_total{key="a",kind="output"}'] > 0


def _final(client: OpenAI, name: str) -> Batch | None:
    batch = client.batches.retrieve(name)
    return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None
