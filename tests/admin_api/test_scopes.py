"""Named tokens, what each may do, and the audit line that says who did it."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import BearerTokens
from pointsman.admin_api.callers import Scope, needed
from pointsman.admin_api.tokens import TokenStore
from pointsman.config.keys_file import digest_of
from pointsman.daemon.errors import ConfigErrors
from tests.admin_api.conftest import Client
from tests.fakes.control_port import FakeControlPort

TOKENS = {"grafana": "read", "trainer": "operate", "alice": "admin"}


def secret(name: str) -> str:
    return f"the-token-of-{name}"


def write(path: Path, scopes: dict[str, str]) -> None:
    entries = {name: {"sha256": digest_of(secret(name)).hex(), "scope": scope} for name, scope in scopes.items()}
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"tokens": entries}))
    draft.chmod(0o600)
    draft.rename(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    write(path, TOKENS)
    return path


@pytest.fixture
async def client(aiohttp_client: Callable[..., Awaitable[Any]], port: FakeControlPort, file: Path) -> Client:
    client: Client = await aiohttp_client(build_app(port, auth=BearerTokens(TokenStore(file))))
    return client


async def status(client: Client, name: str, method: str, path: str, **more: Any) -> int:
    async with client.request(method, path, headers={"Authorization": f"Bearer {secret(name)}"}, **more) as answer:
        return answer.status


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/workers", Scope.READ),
        ("GET", "/config/history", Scope.READ),
        ("GET", "/get_loads", Scope.READ),
        ("POST", "/workers/w1/drain", Scope.OPERATE),
        ("POST", "/flush_cache", Scope.OPERATE),
        ("PUT", "/log-level", Scope.OPERATE),
        ("POST", "/pause", Scope.OPERATE),
        ("POST", "/workers", Scope.ADMIN),
        ("DELETE", "/workers/w1", Scope.ADMIN),
        ("POST", "/update_weights_from_disk", Scope.ADMIN),
        ("POST", "/config/rollback", Scope.ADMIN),
        ("POST", "/config/apply", Scope.ADMIN),
        ("POST", "/add_worker?url=http://127.0.0.1:1", Scope.ADMIN),
    ],
)
async def test_every_scope_may_what_it_says_and_no_more(client: Client, method: str, path: str, scope: Scope) -> None:
    for name, own in TOKENS.items():
        is_refused = await status(client, name, method, path) == 403
        assert is_refused == (Scope[own.upper()] < scope), name


def test_a_route_that_nobody_thought_of_is_for_admins() -> None:
    assert needed("POST", "/something/new") is Scope.ADMIN
    assert needed("DELETE", "/something/new") is Scope.ADMIN


async def test_the_refusal_names_the_scope(client: Client, port: FakeControlPort) -> None:
    headers = {"Authorization": f"Bearer {secret('grafana')}"}
    async with client.post("/flush_cache", headers=headers) as answer:
        assert (await answer.json())["code"] == "SCOPE"
        assert "grafana may read; POST /flush_cache needs the scope operate" in await answer.text()
    assert port.calls == []


async def test_a_revoked_token_is_refused_with_the_next_request(client: Client, file: Path) -> None:
    assert await status(client, "trainer", "GET", "/workers") == 200
    write(file, {"alice": "admin"})
    assert await status(client, "trainer", "GET", "/workers") == 401
    assert await status(client, "alice", "GET", "/workers") == 200


async def test_each_token_of_the_file_is_compared_whatever_is_shown(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good, wrong, nearly good, or good until a moment ago: it takes the same time."""
    compared: list[int] = []
    original = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return original(one, other)

    write(file, {"trainer": "read"} | {f"token-{number}": "read" for number in range(9)})
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for name in ("trainer", "token-8", "token-9", "alice", ""):
        await status(client, name, "GET", "/workers")
        assert compared == [32] * 10, name
        compared.clear()


async def test_a_changed_scope_is_in_force_with_the_next_request(client: Client, file: Path) -> None:
    assert await status(client, "grafana", "POST", "/flush_cache") == 403
    write(file, TOKENS | {"grafana": "operate"})
    assert await status(client, "grafana", "POST", "/flush_cache") == 200


async def test_a_file_with_a_defect_changes_nothing(
    client: Client, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(file, TOKENS | {"grafana": "everything"})
    assert await status(client, "grafana", "GET", "/workers") == 200
    assert "scope: expected 'read', 'operate' or 'admin'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"tokens": {"a": "clear-text-token"}}, "expected an object"),
        ({"tokens": {"a": {"sha256": "12", "scope": "read"}}}, "is not the SHA-256 of a token"),
        ({"tokens": {"a": {"sha256": "0" * 64, "scope": "read"}, "b": {"sha256": "0" * 64, "scope": "admin"}}}, "same"),
        ({"tokens": {"a b": {"sha256": "0" * 64, "scope": "read"}}}, "a token's name"),
        ({"tokens": {"a": {"sha256": "0" * 64}}}, "scope"),
        ({"token": {}}, "tokens"),
    ],
)
def test_defects_are_named_and_no_token_is_told(tmp_path: Path, document: Any, problem: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigErrors) as refused:
        TokenStore(path)
    assert problem in str(refused.value)
    assert f"{path}:" in str(refused.value)
    assert "clear-text-token" not in str(refused.value)


async def test_the_audit_line_names_who_what_and_what_it_changed(
    client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    assert await status(client, "trainer", "PUT", "/log-level", json={"level": "error"}) == 200
    assert await status(client, "grafana", "PUT", "/log-level", json={"level": "debug"}) == 403
    async with client.put("/log-level", json={"level": "debug"}) as answer:
        assert answer.status == 401
    output = capfd.readouterr().err
    lines = [line for line in map(json.loads, output.splitlines()) if line["event"] == "audit"]
    assert [(line["who"], line["scope"], line["status"]) for line in lines] == [
        ("trainer", "operate", 200),
        ("grafana", "read", 403),
        (None, None, 401),
    ]
    assert (lines[0]["before"]["level"], lines[0]["after"]["level"]) == ("info", "error")
    assert "after" not in lines[1]
    assert all(secret(name) not in output for name in TOKENS)
