"""TLS on both sides of two shards: clients in front, https workers behind, certificates that change under load."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import DefaultHttpxClient, OpenAI

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.certificates import Authority, Pair
from tests.fakes.edits import write_and_rename
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.scripted_worker import OK, ScriptedWorker, Session
from tests.fakes.traffic import Client, Traffic, client_of_each, completion, request

SWAPS = 20
KEY = "sk-test-0123456789"
BIG = 100_000


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2) as running:
        yield [engine.url for engine in running]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


def address_of(gate: Gateway) -> tuple[str, int]:
    return gate.host, gate.port


def shown(gate: Gateway, context: ssl.SSLContext) -> bytes:
    """The certificate that a new connection gets to see."""
    with Client(address_of(gate), secure=context) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        return client.sock.getpeercert(binary_form=True) or b""


def curl(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "10", *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def untold(gate: Gateway) -> list[dict[str, Any]]:
    """What nobody wants to read in a log because a client cannot shake hands."""
    return [line for line in gate.log if line.get("level") == "error" or line["event"] == "text"]


# --- clients


def test_pythons_client_and_curl_and_the_openai_sdk(engines: list[str], authority: Authority) -> None:
    with gateway(*authority.issue().flags, workers=engines) as gate:
        context = authority.client_context()
        with client_of_each(gate.pids("shard"), address_of(gate), secure=context) as clients:
            for client in clients.values():
                assert isinstance(client.sock, ssl.SSLSocket)
                assert client.sock.version() == "TLSv1.3"
                assert client.ask(completion()).status == 200
                assert b"data: [DONE]" in client.ask(completion(max_tokens=5, stream=True)).body
                big = request({"model": "sim-model", "prompt": "x " * BIG, "max_tokens": 1})
                assert client.ask(big).status == 200
        url = f"https://localhost:{gate.port}"
        trusting = ("--cacert", str(authority.file))
        answer = curl(f"{url}/v1/completions", *trusting, "--http2", "-w", "%{http_version} %{ssl_verify_result}",
                      "-d", '{"model": "sim-model", "prompt": "x", "max_tokens": 1}')  # fmt: skip
        assert answer.stdout.endswith("}1.1 0"), answer
        assert curl(f"{url}/health").returncode == 60, "an authority that nobody knows"
        sdk = OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0, http_client=DefaultHttpxClient(verify=context))
        with sdk:
            stream = sdk.completions.create(model="sim-model", prompt="hello", max_tokens=3, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_what_is_not_spoken_is_refused(engines: list[str], authority: Authority) -> None:
    with gateway(*authority.issue().flags, workers=engines) as gate:
        with Client(address_of(gate)) as plain:
            plain.sock.sendall(completion())
            assert not plain.read_to_end().startswith(b"HTTP")
        old = authority.client_context()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            shown(gate, old)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = authority.client_context()
            context.minimum_version = context.maximum_version = version
            assert shown(gate, context)
        with Client(address_of(gate), secure=authority.client_context()) as client:
            assert client.get("/health").status == 200
        assert untold(gate) == []


def test_clients_that_stop_in_a_handshake_are_let_go(engines: list[str], authority: Authority) -> None:
    with gateway(*authority.issue().flags, "--header-timeout-s", "0.5", workers=engines) as gate:
        with socket.create_connection(address_of(gate), timeout=10) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(address_of(gate), timeout=10) as half:
            half.sendall(b"\x16\x03\x01\x02\x00")
            assert half.recv(1) == b""


# --- certificates that change


@pytest.mark.slow
def test_certificates_swapped_under_load(engines: list[str], authority: Authority) -> None:
    """Certificate, then key, as tools write them: between the two they do not belong together, and nobody notices."""
    pair = authority.issue()
    context = authority.client_context()
    with ExitStack() as stack:
        gate = stack.enter_context(gateway(*pair.flags, workers=engines))
        address = address_of(gate)
        stays = stack.enter_context(Traffic(address, completion(), connections=8, secure=context))
        closing = request({"model": "sim-model", "prompt": "x", "max_tokens": 1}, headers={"Connection": "close"})
        comes = stack.enter_context(Traffic(address, closing, connections=8, secure=context))
        long = stack.enter_context(
            Traffic(address, completion(max_tokens=200, stream=True), connections=4, secure=context)
        )
        clients = stack.enter_context(client_of_each(gate.pids("shard"), address, secure=context))
        seen = {shown(gate, context)}
        for number in range(SWAPS):
            fresh = authority.issue("fresh")
            write_and_rename(pair.certificate, fresh.certificate.read_bytes())
            if number % 4 == 0:
                gate.wait_until("the mismatch is noticed", lambda: not config_is_ok(gate))
                assert shown(gate, context) != fresh.der
            _replace_key(pair, fresh)
            gate.wait_until("the new one is shown", lambda: shown(gate, context) == fresh.der)  # noqa: B023
            assert {shown(gate, context) for _ in range(8)} == {fresh.der}, "on all shards at once"
            seen.add(fresh.der)
            assert [client.ask(completion()).status for client in clients.values()] == [200, 200]
        reports = [traffic.stop() for traffic in (stays, comes, long)]
        for report in reports:
            assert report.failures == []
            assert report.answered > SWAPS
        assert len(seen) == SWAPS + 1
        assert gate.admin("GET", "/config")[1]["errors"] == []
    print(f"\n{SWAPS} swaps, {[report.answered for report in reports]} answers, none failed")


def config_is_ok(gate: Gateway) -> bool:
    return bool(gate.admin("GET", "/config")[1]["last_reload_ok"])


def _replace_key(pair: Pair, fresh: Pair) -> None:
    aside = pair.key.with_suffix(".new")
    aside.touch(mode=0o600)
    aside.write_bytes(fresh.key.read_bytes())
    aside.replace(pair.key)


@pytest.mark.parametrize("spoil", ["key of another", "readable", "gone", "rubbish"])
def test_a_broken_pair_is_refused_and_the_old_one_goes_on(engines: list[str], authority: Authority, spoil: str) -> None:
    pair = authority.issue()
    context = authority.client_context()
    with gateway(*pair.flags, workers=engines) as gate:
        before = shown(gate, context)
        kept = pair.key.read_bytes()
        says = _spoil(authority, pair, spoil)
        gate.wait_until("it is refused", lambda: not config_is_ok(gate))
        (message,) = gate.admin("GET", "/config")[1]["errors"]
        assert says in message
        gate.wait_log("config_refused", place=str(pair.key))
        assert {shown(gate, context) for _ in range(8)} == {before}
        pair.key.write_bytes(kept)
        pair.key.chmod(0o600)
        gate.wait_until("mended", lambda: config_is_ok(gate))
        assert shown(gate, context) == before


def _spoil(authority: Authority, pair: Pair, how: str) -> str:
    if how == "key of another":
        pair.key.write_bytes(authority.issue("other").key.read_bytes())
        return "the private key does not belong to the certificate"
    if how == "readable":
        pair.key.chmod(0o644)
        return f"every user of the machine may open (mode 0644) (chmod o-rwx {pair.key})"
    if how == "gone":
        pair.key.unlink()
        return "no such file"
    write_and_rename(pair.key, b"rubbish")
    pair.key.chmod(0o600)
    return "holds no private key"


def test_a_bad_pair_at_the_start_is_no_start(tmp_path: Path, authority: Authority) -> None:
    pair = authority.issue()
    for flags, code, says in (
        (Pair(pair.certificate, authority.issue("other").key).flags, 78, "does not belong to the certificate"),
        (pair.flags[:2], 64, "needs --tls-key"),
        (("--tls-client-ca", str(authority.file)), 64, "needs --tls-cert"),
    ):
        gate = Gateway(tmp_path, flags)
        assert gate.wait_ended(5) == code
        gate.close()
        assert says in gate.log_text()


def test_a_killed_shard_comes_back_with_the_certificate_in_force(engines: list[str], authority: Authority) -> None:
    pair = authority.issue()
    context = authority.client_context()
    with gateway(*pair.flags, workers=engines) as gate:
        before = shown(gate, context)
        pair.certificate.unlink()
        gate.wait_until("it is missed", lambda: not config_is_ok(gate))
        killed = gate.pids("shard")
        for pid in killed:
            subprocess.run(["kill", "-KILL", str(pid)], check=True)
        gate.wait_until("successors", lambda: not set(killed) & set(gate.pids("shard")))
        gate.wait_until("they serve", lambda: _is_shown(gate, context, before))


def _is_shown(gate: Gateway, context: ssl.SSLContext, certificate: bytes) -> bool:
    try:
        return {shown(gate, context) for _ in range(8)} == {certificate}
    except OSError:
        return False


@pytest.mark.slow
def test_a_stop_waits_for_answers_and_not_for_idle_clients(engines: list[str], authority: Authority) -> None:
    context = authority.client_context()
    with launch_engines(1, "--preset", "h100-8b", "--speed", "0.07") as (paced,), ExitStack() as stack:
        gate = stack.enter_context(gateway(*authority.issue().flags, workers=[paced.url]))
        idle = [stack.enter_context(Client(address_of(gate), secure=context)) for _ in range(4)]
        stream = stack.enter_context(Client(address_of(gate), secure=context))
        stream.sock.sendall(completion(max_tokens=20, stream=True))
        stream.read_head()
        assert [client.get("/health").status for client in idle] == [200] * 4
        gate.signal(signal.SIGTERM)
        assert b"data: [DONE]" in stream.read_to_end()
        ended = time.monotonic()
        assert gate.wait_ended(5) == 0
        assert time.monotonic() - ended < 5.0 * leeway()
        assert [client.read_more() for client in idle] == [b""] * 4, "they are told: the end is no broken connection"


def test_an_upgrade_takes_certificate_and_keys_along(engines: list[str], authority: Authority, tmp_path: Path) -> None:
    """Under load; whoever takes over has both from the first handshake on."""
    pair, path = authority.issue(), tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": {"a": {"key": KEY}}}))
    context = authority.client_context()
    wire = request(
        {"model": "sim-model", "prompt": "x", "max_tokens": 1},
        headers={"Authorization": f"Bearer {KEY}", "Connection": "close"},
    )
    with gateway(*pair.flags, "--api-key-file", str(path), workers=engines) as gate:
        before = shown(gate, context)
        with Traffic(address_of(gate), wire, connections=8, secure=context) as traffic:
            done = gate.upgrade("--json")
            assert done.returncode == 0, done.stdout + done.stderr + gate.log_text()
            gate.wait_log("ready", pid=json.loads(done.stdout)["pid"])
            assert {shown(gate, context) for _ in range(8)} == {before}
            with Client(address_of(gate), secure=context) as stranger:
                assert stranger.ask(completion()).status == 401
            report = traffic.stop()
        assert report.failures == []
        assert report.answered > 0


def test_a_client_that_reads_slowly_holds_its_engine_back(authority: Authority) -> None:
    """And not the gateway's memory: what it does not read stays where it is."""
    size = 64 << 20
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size
    sent = 0

    def stream(session: Session) -> None:
        nonlocal sent
        while (seen := session.read()) is not None:
            if not seen.line.startswith(b"POST"):
                session.write(OK)
                continue
            session.write(head)
            while sent < size:
                session.write(b" " * 65536)
                sent += 65536

    with ScriptedWorker(stream) as worker, gateway(*authority.issue().flags, workers=[worker.url]) as gate:
        with Client(address_of(gate), secure=authority.client_context()) as client:
            client.sock.sendall(completion())
            client.read_head()
            last = -1
            while last != sent:  # until nothing moves any more
                last = sent
                time.sleep(0.3)  # the worker's pace, not ours
            assert sent < size / 2
            rest = size - len(client.rest)
            while rest:
                rest -= len(client.sock.recv(1 << 20))
        assert sent == size


def test_no_private_key_is_told(engines: list[str], authority: Authority) -> None:
    pair = authority.issue()
    with gateway(*pair.flags, "--log-level", "debug", workers=engines) as gate:
        assert shown(gate, authority.client_context())
        _spoil(authority, pair, "key of another")
        gate.wait_until("it is refused", lambda: not config_is_ok(gate))
        told = json.dumps([gate.admin("GET", path)[1] for path in ("/status", "/config", "/workers", "/metrics")])
        told += json.dumps(gate.log)
        told += "".join(
            kept.read_bytes().decode("latin-1") for kept in (gate.folder / "state").rglob("*") if kept.is_file()
        )
    lines = [line for line in pair.key.read_text().splitlines() if line and not line.startswith("-")]
    assert lines
    assert not any(line in told for line in lines)
    assert "PRIVATE KEY-----\\n" not in told


# --- clients with certificates


def test_clients_certificates(engines: list[str], authority: Authority, tmp_path: Path) -> None:
    clients_authority, others = Authority(tmp_path / "clients"), Authority(tmp_path / "others")
    good, stranger = clients_authority.issue("client", "client"), others.issue("client", "client")
    flags = (*authority.issue().flags, "--tls-client-ca", str(clients_authority.file))
    with gateway(*flags, workers=engines) as gate:

        def may_ask(pair: Pair | None) -> bool:
            try:
                with Client(address_of(gate), secure=authority.client_context(pair)) as client:
                    return client.ask(completion()).status == 200
            except OSError:  # in TLS 1.3 a client learns of it with its first read
                return False

        assert [may_ask(pair) for pair in (good, stranger, None)] == [True, False, False]
        with Client(address_of(gate), secure=authority.client_context(good)) as client:
            assert client.ask(completion()).status == 200
            write_and_rename(clients_authority.file, others.file.read_bytes())
            gate.wait_until("the other authority", lambda: may_ask(stranger))
            assert [may_ask(pair) for pair in (good, None)] == [False, False]
            assert client.ask(completion()).status == 200, "who is in stays in"
        assert untold(gate) == []


# --- https workers


def test_an_https_worker_of_an_authority_of_its_own(authority: Authority, tmp_path: Path) -> None:
    ca = tmp_path / "workers.pem"
    ca.write_bytes(Authority(tmp_path / "wrong").file.read_bytes())
    flags = ("--worker-ca-file", str(ca), "--health-interval-s", "0.1")
    with (
        ScriptedWorker(secure=authority.server_context(authority.issue())) as worker,
        gateway(*flags, "--workers-file", str(_workers_file(tmp_path, worker.url))) as gate,
    ):
        gate.wait_until("its certificate is refused", lambda: "certificate" in (gate.workers()[0]["last_error"] or ""))
        assert not gate.workers()[0]["is_healthy"]
        write_and_rename(ca, authority.file.read_bytes())
        gate.wait_healthy(1)
        with client_of_each(gate.pids("shard"), address_of(gate)) as clients:
            for client in clients.values():
                assert [client.ask(completion()).status for _ in range(3)] == [200] * 3
        write_and_rename(ca, Authority(tmp_path / "wrong").file.read_bytes())
        gate.wait_until("it is refused again", lambda: not gate.workers()[0]["is_healthy"])


def test_a_worker_whose_name_is_not_in_its_certificate(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("elsewhere", "elsewhere.example")
    with (
        ScriptedWorker(secure=authority.server_context(pair)) as worker,
        gateway(
            "--worker-ca-file", str(authority.file), "--workers-file", str(_workers_file(tmp_path, worker.url))
        ) as gate,
    ):
        gate.wait_until("it is refused", lambda: "certificate" in (gate.workers()[0]["last_error"] or ""))


def _workers_file(folder: Path, url: str) -> Path:
    path = folder / "workers.json"
    path.write_text(json.dumps({"workers": [{"url": url}]}))
    return path
