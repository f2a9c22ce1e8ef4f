"""Fan-outs on the data port of a daemon with two shards: for whom, and what becomes of them while control is away."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pointsman.config.keys_file import digest_of
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.e2e.test_fanout import arm, asked, state
from tests.fakes.data_plane import data_plane
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.processes import is_alive, wait_until
from tests.fakes.traffic import Client, Reply, client_of_each, completion

ON = ("--admin-on-data-port", "--admin-networks", "127.0.0.2/32")
FRIEND = "127.0.0.2"
"""an address inside of admin_networks; everybody else comes from 127.0.0.1"""
TOKENS = {"grafana": "read", "trainer": "operate", "alice": "admin"}
LONG = 16 << 20
CLIENT_KEY = "sk-a-client-of-the-engines"


def wire(method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    fields = ({"Content-Type": "application/json"} if body else {}) | dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway.internal", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@contextmanager
def friend(gate: Gateway) -> Iterator[Client]:
    """A client whose address is inside of the networks."""
    with Client((gate.host, gate.port)) as client:
        client.sock.close()
        client.sock = socket.create_connection((gate.host, gate.port), timeout=10, source_address=(FRIEND, 0))
        yield client


def ask(gate: Gateway, data: bytes) -> Reply:
    with Client((gate.host, gate.port)) as client:
        return client.ask(data)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--flavor", "sglang") as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway(*ON, workers=engines) as running:
        running.wait_healthy(2)
        yield running


# --- who may


def test_a_token_is_good_on_every_shard(gate: Gateway, engines: list[str]) -> None:
    before = [asked(url, "/flush_cache") for url in engines]
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        for client in clients.values():
            answer = client.ask(wire("POST", "/flush_cache", headers=bearer(gate.token)))
            assert (answer.status, answer.json["succeeded"]) == (200, engines)
            assert answer.headers["x-request-id"].startswith("req-")
            assert client.ask(completion()).status == 200, "the connection goes on"
    assert [asked(url, "/flush_cache") for url in engines] == [count + 2 for count in before]


def test_an_address_inside_of_the_networks_needs_none(gate: Gateway, engines: list[str]) -> None:
    with friend(gate) as client:
        answer = client.ask(wire("POST", "/pause_generation", b'{"mode": "in_place"}'))
        assert (answer.status, answer.json["succeeded"]) == (200, engines)
        assert client.ask(wire("POST", "/continue_generation", b"{}")).status == 200
        assert client.ask(wire("POST", "/flush_cache", headers=bearer("not-a-token"))).status == 200
    gate.wait_log("audit", who=f"network:{FRIEND}", peer=FRIEND, path="/pause_generation", status=200)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "no_admin_token"),
        ({"X-Pointsman-Peer": FRIEND}, 401, "no_admin_token"),
        ({"X-Forwarded-For": FRIEND}, 401, "no_admin_token"),
        ({"X-Pointsman-Peer": FRIEND, **bearer("wrong")}, 401, "UNAUTHORIZED"),
        ({"x-api-key": "wrong", **bearer("wrong")}, 401, "UNAUTHORIZED"),
    ],
)
def test_everybody_else_is_refused(
    gate: Gateway, engines: list[str], headers: dict[str, str], status: int, code: str
) -> None:
    before = [asked(url, "/flush_cache") for url in engines]
    answer = ask(gate, wire("POST", "/flush_cache", headers=headers))
    found = answer.json["code"] if "code" in answer.json else answer.json["error"]["code"]
    assert (answer.status, found) == (status, code)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert [asked(url, "/flush_cache") for url in engines] == before


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://gateway.internal"}, {"Sec-Fetch-Site": "same-origin"}, {"Content-Type": "text/plain"}],
)
def test_no_page_in_a_browser_of_a_friend_gets_through(gate: Gateway, headers: dict[str, str]) -> None:
    with friend(gate) as client:
        assert client.ask(wire("POST", "/flush_cache", headers=headers)).status in (403, 415)


def test_scopes_hold_and_a_clients_key_is_none(engines: list[str], tmp_path: Path) -> None:
    tokens, keys = tmp_path / "tokens.json", tmp_path / "keys.json"
    entries = {name: {"sha256": digest_of(f"token-{name}").hex(), "scope": scope} for name, scope in TOKENS.items()}
    tokens.write_text(json.dumps({"tokens": entries}))
    keys.write_text(json.dumps({"keys": {"client": {"sha256": digest_of(CLIENT_KEY).hex()}}}))
    for file in (tokens, keys):
        file.chmod(0o600)
    with gateway(*ON, "--admin-token-file", str(tokens), "--api-key-file", str(keys), workers=engines) as gate:
        gate.wait_healthy(2)

        def status(method: str, path: str, token: str, body: bytes = b"") -> int:
            return ask(gate, wire(method, path, body, headers=bearer(token))).status

        assert status("GET", "/get_loads", "token-grafana") == 200
        assert status("POST", "/flush_cache", "token-grafana") == 403
        assert status("POST", "/flush_cache", "token-trainer") == 200
        assert status("POST", "/update_weights_from_disk", "token-trainer", b'{"model_path": "/new"}') == 403
        assert status("POST", "/update_weights_from_disk", "token-alice", b'{"model_path": "/new"}') == 200
        assert status("POST", "/flush_cache", CLIENT_KEY) == 401
        assert status("GET", "/v1/models", "token-alice") == 401, "nor is a token a key"
        with friend(gate) as client:
            assert client.ask(wire("POST", "/flush_cache")).status == 200, "no key is needed there"
        assert not [token for token in ("token-", CLIENT_KEY) if token in json.dumps(gate.log)]


# --- what


def test_nothing_else_of_the_admin_api_is_there(gate: Gateway) -> None:
    for method, path in (
        ("GET", "/status"),
        ("GET", "/workers"),
        ("POST", "/workers"),
        ("POST", "/pause"),
        ("GET", "/"),
    ):
        assert ask(gate, wire(method, path, headers=bearer(gate.token))).status in (404, 405), path
    assert ask(gate, wire("GET", "/flush_cache", headers=bearer(gate.token))).status == 405


def test_loads_and_metrics(gate: Gateway, engines: list[str]) -> None:
    with friend(gate) as client:
        assert [row["worker"] for row in client.get("/get_loads").json["workers"]] == engines
        page = client.get("/engine_metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert f'pointsman_engine_metrics_up{{worker="{engines[0]}"}} 1' in page.body.decode()


def test_handles_of_tensors_are_long_and_get_through(gate: Gateway, engines: list[str]) -> None:
    body = json.dumps({"serialized_named_tensors": ["x" * LONG], "weight_version": "of tensors"}).encode()
    answer = ask(gate, wire("POST", "/update_weights_from_tensor", body, headers=bearer(gate.token)))
    assert (answer.status, answer.json["succeeded"]) == (200, engines)
    assert {state(url)["weight_version"] for url in engines} == {"of tensors"}


def test_partial_success_is_told_as_on_the_admin_api(gate: Gateway, engines: list[str], dead_port: int) -> None:
    dead = f"http://127.0.0.1:{dead_port}"
    gate.add_worker(dead)
    try:
        answer = ask(gate, wire("POST", "/flush_cache?include_down=1", headers=bearer(gate.token)))
    finally:
        assert gate.admin("DELETE", f"/workers/{dead.replace('/', '%2F')}")[0] == 202
    assert (answer.status, answer.json["succeeded"]) == (206, engines)
    assert [(row["worker"], row["error"]) for row in answer.json["failed"]] == [(dead, "connection refused")]


def test_it_is_off_unless_it_is_asked_for() -> None:
    with data_plane(shards=1) as plane:
        plane.publish()
        with Client(plane.address) as client:
            answer = client.ask(wire("POST", "/flush_cache", headers=bearer("any")))
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")


# --- without control


def test_while_control_is_away_they_are_503_and_afterwards_they_work(engines: list[str]) -> None:
    with ExitStack() as stack:
        gate = stack.enter_context(gateway(*ON, workers=engines))
        gate.wait_healthy(2)
        flush = wire("POST", "/flush_cache", headers=bearer(gate.token))
        clients = stack.enter_context(client_of_each(gate.pids("shard"), (gate.host, gate.port))).values()
        (control,) = gate.pids("control")
        stack.callback(arm, engines[0])
        before = asked(engines[0], "/flush_cache")
        arm(engines[0], {"kind": "hang", "path": "/flush_cache"})
        under_way, *_ = clients
        under_way.sock.sendall(flush)
        gate.wait_until("the engine is asked", lambda: asked(engines[0], "/flush_cache") > before)

        os.kill(gate.main_pid, signal.SIGSTOP)  # no successor before the test has looked
        stack.callback(os.kill, gate.main_pid, signal.SIGCONT)
        os.kill(control, signal.SIGKILL)
        wait_until("control is gone", lambda: not is_alive(control), 10)
        assert_unavailable(under_way.read())
        for client in clients:
            assert_unavailable(client.ask(flush))
            assert client.ask(completion()).status == 200, "requests go on"

        arm(engines[0])
        os.kill(gate.main_pid, signal.SIGCONT)
        for client in clients:
            gate.wait_until("its successor answers", lambda client=client: client.ask(flush).status == 200)  # type: ignore[misc]


def assert_unavailable(answer: Reply) -> None:
    assert (answer.status, answer.json["error"]["code"]) == (503, "fan_outs_unavailable")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.slow
def test_they_go_on_after_an_upgrade(engines: list[str], tmp_path: Path) -> None:
    with gateway(*ON, workers=engines, folder=tmp_path) as gate:
        gate.wait_healthy(2)
        assert gate.upgrade().returncode == 0, gate.log_text()
        answer = ask(gate, wire("POST", "/flush_cache", headers=bearer(gate.token)))
        assert (answer.status, answer.json["succeeded"]) == (200, engines)
