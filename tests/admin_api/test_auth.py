"""Tokens over TCP: who gets in, and what a wrong token costs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import BearerTokens, Throttle
from pointsman.admin_api.tokens import TokenStore
from tests.admin_api.raw import request, send
from tests.fakes.admin_server import admin_server
from tests.fakes.control_port import FakeControlPort

TOKEN = "a-token-of-forty-three-characters-or-so-1234"
GOOD = {"Authorization": f"Bearer {TOKEN}"}
WRONG = {"Authorization": "Bearer wrong"}


class Clock:
    """Time that passes when somebody sleeps; `held` makes sleepers wait for `release`."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []
        self.has_sleepers = asyncio.Event()
        self.release = asyncio.Event()
        self.release.set()

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.has_sleepers.set()
        await self.release.wait()
        self.time += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return TokenStore(path)


@pytest.fixture
async def client(
    aiohttp_client: Callable[[web.Application], Awaitable[Any]], port: FakeControlPort, store: TokenStore, clock: Clock
) -> Any:
    auth = BearerTokens(store, now=clock.now, sleep=clock.sleep)
    return await aiohttp_client(build_app(port, auth=auth))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_token_opens(client: Any, scheme: str) -> None:
    assert (await client.get("/status", headers={"Authorization": f"{scheme} {TOKEN}"})).status == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer "}, WRONG]
)
async def test_anything_else_is_401_json(client: Any, port: FakeControlPort, headers: dict[str, str]) -> None:
    response = await client.get("/status", headers=headers)
    assert (response.status, (await response.json())["code"]) == (401, "UNAUTHORIZED")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert port.calls == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/workers"),
        ("POST", "/workers"),
        ("DELETE", "/workers/x"),
        ("GET", "/config"),
        ("POST", "/config/reload"),
        ("GET", "/metrics"),
        ("GET", "/list_workers"),
        ("POST", "/add_worker?url=http://127.0.0.1:1"),
        ("POST", "/remove_worker?url=http://127.0.0.1:1"),
        ("GET", "/nowhere"),
        ("GET", "/health/"),
    ],
)
async def test_everything_but_health_needs_it(client: Any, port: FakeControlPort, method: str, path: str) -> None:
    response = await client.request(method, path, headers={"Content-Type": "application/json"})
    assert response.status == 401
    assert port.calls == []


async def test_health_needs_none(client: Any) -> None:
    assert (await client.get("/health")).status == 200
    assert (await client.get("/health", headers=WRONG)).status == 200


@pytest.mark.parametrize("name", ["token", "access_token", "api_key"])
async def test_a_token_in_the_query_does_not_count(client: Any, name: str) -> None:
    assert (await client.get("/status", params={name: TOKEN})).status == 401


async def test_two_authorization_headers_are_refused(client: Any) -> None:
    headers = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer wrong")]
    assert (await client.get("/status", headers=headers)).status == 400


async def test_a_strangers_body_is_not_read(client: Any) -> None:
    async def endless() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    headers = {"Content-Type": "application/json"}
    async with asyncio.timeout(30):
        response = await client.post("/workers", data=endless(), headers=headers)
    assert response.status == 401


async def test_the_token_is_never_logged(client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    await client.post("/config/reload", headers=GOOD)
    await client.get("/status", headers={"Authorization": "Bearer nearly-the-token"})
    output = capfd.readouterr().err
    assert "admin_token_refused" in output
    assert TOKEN not in output
    assert "nearly-the-token" not in output


async def test_wrong_tokens_are_answered_ever_later(client: Any, clock: Clock) -> None:
    for _ in range(8):
        assert (await client.get("/status", headers=WRONG)).status == 401
    assert clock.slept == [0, 0, 0, 0.25, 0.5, 1.0, 2.0, 2.0]


async def test_a_missing_token_costs_nothing(client: Any, clock: Clock) -> None:
    for _ in range(20):
        assert (await client.get("/status")).status == 401
    assert clock.slept == []


async def test_while_one_waits_for_its_refusal_others_are_served(client: Any, clock: Clock) -> None:
    clock.release.clear()
    waiting = asyncio.ensure_future(client.get("/status", headers=WRONG))
    await clock.has_sleepers.wait()
    assert (await client.get("/status", headers=GOOD)).status == 200
    assert not waiting.done()
    clock.release.set()
    assert (await waiting).status == 401


async def test_loopback_is_never_locked_out(client: Any) -> None:
    for _ in range(Throttle.LOCKED_FAILURES + 5):
        await client.get("/status", headers=WRONG)
    assert (await client.get("/status", headers=GOOD)).status == 200


async def test_another_machine_is_not_heard_after_too_many(
    client: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.BaseRequest, "remote", "192.0.2.7")
    for _ in range(Throttle.LOCKED_FAILURES):
        assert (await client.get("/status", headers=WRONG)).status == 401
    locked = await client.get("/status", headers=GOOD)
    assert (locked.status, locked.headers["Retry-After"]) == (429, "59")
    monkeypatch.setattr(web.BaseRequest, "remote", "192.0.2.8")
    assert (await client.get("/status", headers=GOOD)).status == 200
    monkeypatch.setattr(web.BaseRequest, "remote", "192.0.2.7")
    clock.time += Throttle.FORGET_S
    assert (await client.get("/status", headers=GOOD)).status == 200


def test_loopback_is_loopback_on_every_kind_of_socket() -> None:
    throttle = Throttle()
    for peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        for _ in range(Throttle.LOCKED_FAILURES):
            throttle.failed(peer, 0.0)
        assert throttle.locked_for_s(peer, 1.0) == 0


def test_the_throttle_forgets_and_is_bounded() -> None:
    throttle = Throttle()
    for number in range(Throttle.MAX_PEERS + 1):
        for _ in range(Throttle.LOCKED_FAILURES):
            throttle.failed(f"192.0.2.{number}", 0.0)
    assert throttle.locked_for_s("192.0.2.0", 1.0) == 0
    assert throttle.locked_for_s("192.0.2.1", 1.0) == Throttle.FORGET_S - 1
    assert throttle.locked_for_s("192.0.2.1", Throttle.FORGET_S) == 0
    assert throttle.failed("192.0.2.1", 2 * Throttle.FORGET_S + 1) == 0


def test_health_by_another_spelling_is_not_health(tmp_path: Path, store: TokenStore) -> None:
    with admin_server(tmp_path, auth=BearerTokens(store)) as server:
        for path in ("//health", "/./health", "/health/../workers", "/health;x"):
            assert send(server.tcp, request("GET", path)).status == 401, path


def test_the_guard_comes_first_and_the_unix_socket_asks_for_nothing(tmp_path: Path, store: TokenStore) -> None:
    with admin_server(tmp_path, auth=BearerTokens(store)) as server:
        authorization = f"Authorization: Bearer {TOKEN}"
        assert send(server.tcp, request("GET", "/status", authorization)).status == 200
        assert send(server.tcp, request("GET", "/status")).status == 401
        assert send(server.tcp, request("GET", "/status", authorization, host="evil.example")).status == 421
        assert send(server.tcp, request("GET", "/status", authorization, "Origin: http://evil.example")).status == 403
        assert send(server.unix, request("GET", "/status")).status == 200
