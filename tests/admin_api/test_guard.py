"""Browsers and odd clients, byte for byte: what a page somewhere on the web could make a browser send must not pass."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointsman.admin_api import guard
from tests.admin_api.raw import RawAnswer, connect, receive, request, send
from tests.fakes.admin_server import AdminServer, admin_server

JSON = "Content-Type: application/json"
WORKER = b'{"url": "http://127.0.0.1:8000"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminServer]:
    names = ("gateway.example", "other.example:9000")
    with admin_server(tmp_path_factory.mktemp("admin"), host_names=names) as running:
        yield running


@pytest.fixture(autouse=True)
def _forget(server: AdminServer) -> None:
    server.port.calls.clear()
    server.port.live.clear()


def code(answer: RawAnswer) -> str:
    return str(json.loads(answer.body)["code"])


# --- Host


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:1234",
        "LOCALHOST",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.9.9.9",
        "[::1]",
        "[::1]:8701",
        "gateway.example",
        "gateway.example:8080",
        "other.example:9000",
    ],
)
def test_our_own_names_pass(server: AdminServer, host: str) -> None:
    assert send(server.tcp, request("GET", "/workers", host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8701",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.1",
        "0.0.0.0",
        "other.example:9001",
        "user@localhost",
        "localhost/",
        "localhost?",
        "[::1",
        "localhost:port",
        "",
    ],
)
def test_a_foreign_host_is_misdirected(server: AdminServer, host: str) -> None:
    answer = send(server.tcp, request("GET", "/workers", host=host))
    assert answer.status in (400, 421), answer
    assert answer.is_closing


def test_no_host_at_all_is_refused(server: AdminServer) -> None:
    assert send(server.tcp, b"GET /workers HTTP/1.0\r\n\r\n").status in (400, 421)


def test_two_hosts_are_refused(server: AdminServer) -> None:
    assert send(server.tcp, request("GET", "/workers", "Host: evil.example")).status == 400


def test_health_is_guarded_too(server: AdminServer) -> None:
    assert send(server.tcp, request("GET", "/health", host="evil.example")).status == 421


def test_a_unix_socket_takes_any_host(server: AdminServer) -> None:
    assert send(server.unix, request("GET", "/workers", host="whatever")).status == 200


def test_on_a_wildcard_listener_its_own_addresses_pass_and_no_others(tmp_path: Path) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        number = listener.getsockname()[1]
        with admin_server(tmp_path, sock=listener) as server:
            assert server.tcp[1] == number
            own = ("127.0.0.1", number)
            assert send(own, request("GET", "/health", host=f"127.0.0.1:{number}")).status == 200
            assert send(own, request("GET", "/health", host=f"192.0.2.1:{number}")).status == 421


@pytest.mark.parametrize(
    ("host", "sockname", "is_ours"),
    [
        ("10.0.0.5:8701", ("10.0.0.5", 8701), True),
        ("10.0.0.5:8701", ("::ffff:10.0.0.5", 8701, 0, 0), True),
        ("[fe80::1]:8701", ("fe80::1%eth0", 8701, 0, 2), True),
        ("10.0.0.5", ("10.0.0.5", 80), True),
        ("10.0.0.5:8702", ("10.0.0.5", 8701), False),
        ("10.0.0.5", ("10.0.0.5", 8701), False),
        ("10.0.0.6:8701", ("10.0.0.5", 8701), False),
    ],
)
def test_the_address_that_was_connected_to_is_ours(host: str, sockname: tuple[object, ...], is_ours: bool) -> None:
    parts = guard._authority(host)
    assert parts is not None
    assert guard._is_ours(parts, frozenset(), sockname) is is_ours


# --- browsers


@pytest.mark.parametrize(
    "header",
    [
        "Origin: http://evil.example",
        "Origin: null",
        "Origin: http://localhost:1",
        "Origin: file://localhost",
        "Origin: localhost",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
        "Sec-Fetch-Site: surprising",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_sites_are_refused_on_both_sockets(server: AdminServer, method: str, header: str) -> None:
    for address in (server.tcp, server.unix):
        answer = send(address, request(method, "/config/reload" if method == "POST" else "/status", header))
        assert answer.status == 403, answer
    assert server.port.calls == []


@pytest.mark.parametrize(
    "headers", [("Origin: http://localhost",), ("Sec-Fetch-Site: same-origin",), ("Sec-Fetch-Site: none",)]
)
def test_our_own_pages_pass(server: AdminServer, headers: tuple[str, ...]) -> None:
    assert send(server.tcp, request("GET", "/health", *headers)).status == 200


def test_a_preflight_gets_no_permission(server: AdminServer) -> None:
    headers = ("Origin: http://evil.example", "Access-Control-Request-Method: POST")
    answer = send(server.tcp, request("OPTIONS", "/workers", *headers))
    assert answer.status == 403
    assert "access-control-allow" not in answer.head.lower()


@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/plain;application/json",
    ],
)
@pytest.mark.parametrize("body", [WORKER, b""])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/workers"), ("POST", "/add_worker?url=x"), ("DELETE", "/workers/x")]
)
def test_what_a_form_can_send_is_415(
    server: AdminServer, method: str, path: str, body: bytes, content_type: str
) -> None:
    answer = send(server.tcp, request(method, path, f"Content-Type: {content_type}", body=body))
    assert (answer.status, code(answer)) == (415, "UNSUPPORTED_MEDIA_TYPE")


def test_a_body_without_a_type_is_415_and_says_the_header(server: AdminServer) -> None:
    answer = send(server.tcp, request("POST", "/workers", body=WORKER))
    assert answer.status == 415
    assert b"application/json" in answer.body


@pytest.mark.parametrize("content_type", [JSON, "Content-Type: Application/JSON; charset=utf-8"])
def test_json_passes(server: AdminServer, content_type: str) -> None:
    assert send(server.tcp, request("POST", "/workers", content_type, body=WORKER)).status == 202


def test_a_change_without_a_body_needs_no_type(server: AdminServer) -> None:
    assert send(server.tcp, request("POST", "/config/reload")).status == 200
    for header in ("Content-Length: 0", "Content-Type: application/octet-stream"):
        assert send(server.tcp, request("POST", "/remove_worker?url=http://x", header)).status == 200


# --- size and time


def test_an_announced_flood_is_413_and_not_read(server: AdminServer) -> None:
    head = request("POST", "/workers", JSON, f"Content-Length: {guard.MAX_BODY_BYTES + 1}")
    answer = send(server.tcp, head)
    assert (answer.status, code(answer)) == (413, "PAYLOAD_TOO_LARGE")
    assert answer.is_closing


def test_a_chunked_flood_is_413(server: AdminServer) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connect(server.tcp) as sock:
        sock.sendall(request("POST", "/workers", JSON, "Transfer-Encoding: chunked"))
        for _ in range(17):
            sock.sendall(chunk)
        assert receive(sock).status == 413


def test_a_body_that_stalls_is_408(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.body_receiver, "__defaults__", (0.05,))
    with admin_server(tmp_path, lingering_time=0.0) as server, connect(server.tcp) as sock:
        sock.sendall(request("POST", "/workers", JSON, "Content-Length: 100") + b"{")
        answer = receive(sock)
        assert (answer.status, code(answer)) == (408, "REQUEST_TIMEOUT")
        assert sock.recv(1) == b""
        assert server.port.calls == []


def test_a_head_that_stalls_ends_the_connection(tmp_path: Path) -> None:
    with admin_server(tmp_path, keepalive_timeout=0.05) as server, connect(server.tcp) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert sock.recv(1) == b""


# --- bytes that are not HTTP


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET /<x> HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n"],
)
def test_what_is_not_http_is_a_plain_400(
    server: AdminServer, garbage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server.tcp) as sock:
        sock.sendall(garbage + b"\r\n\r\n")
        answer = receive(sock)
        assert (answer.status, code(answer)) == (400, "BAD_HTTP")
        assert sock.recv(1) == b""
    assert "aiohttp" not in answer.head.lower()
    assert "Traceback" not in capfd.readouterr().err


def test_a_compressed_body_is_not_unpacked(server: AdminServer) -> None:
    answer = send(server.tcp, request("POST", "/workers", JSON, "Content-Encoding: gzip", body=b"\x1f\x8b\x08\x00"))
    assert (answer.status, code(answer)) == (400, "BAD_REQUEST")
