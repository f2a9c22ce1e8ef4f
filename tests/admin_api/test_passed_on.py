"""Fan-outs that a shard passes on: whose they are, and what guessing a token costs there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pointsman.admin_api.app import build_fanout_app
from pointsman.admin_api.auth import BearerTokens, Throttle
from pointsman.admin_api.changes import Changes
from pointsman.admin_api.handlers.fanout import OPERATIONS
from pointsman.admin_api.passed_on import TokenOrNetwork
from pointsman.admin_api.tokens import TokenStore
from pointsman.config.settings import Settings
from pointsman.daemon.relay.elsewhere import fanout_paths
from tests.fakes.control_port import FakeControlPort

TOKEN = "a-token-of-forty-three-characters-or-so-1234"


@pytest.fixture
async def client(aiohttp_client: Callable[..., Awaitable[Any]], port: FakeControlPort, tmp_path: Path) -> Any:
    async def at_once(_seconds: float) -> None:
        """How long a wrong token waits is tested elsewhere."""

    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    auth = TokenOrNetwork(BearerTokens(TokenStore(path), sleep=at_once), ("10.1.0.0/16", "fd00::/8"))
    return await aiohttp_client(build_fanout_app(port, auth=auth, changes=Changes()))


async def status(client: Any, peer: str, token: str | None = None) -> int:
    headers = {"X-Pointsman-Peer": peer} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    async with client.post("/flush_cache", headers=headers) as answer:
        return int(answer.status)


@pytest.mark.parametrize(
    ("peer", "token", "expected"),
    [
        ("192.0.2.7", TOKEN, 200),
        ("192.0.2.7", None, 401),
        ("192.0.2.7", "wrong", 401),
        ("10.1.2.3", None, 200),
        ("10.1.2.3", "a key of another door", 200),
        ("::ffff:10.1.2.3", None, 200),
        ("fd00::7", None, 200),
        ("10.2.0.1", None, 401),
        ("127.0.0.1", None, 401),
        ("", None, 401),
        ("10.1.2.3, 192.0.2.7", None, 401),
    ],
)
async def test_a_token_or_an_address(client: Any, peer: str, token: str | None, expected: int) -> None:
    assert await status(client, peer, token) == expected


async def test_who_guesses_is_shut_out_by_the_address_that_the_shard_names(client: Any) -> None:
    for _ in range(Throttle.LOCKED_FAILURES):
        assert await status(client, "192.0.2.7", "wrong") == 401
    assert await status(client, "192.0.2.7", TOKEN) == 429
    assert await status(client, "192.0.2.8", TOKEN) == 200


def test_the_shards_pass_on_what_there_is_and_nothing_else() -> None:
    settings = Settings(runtime_dir="", state_dir="", admin_on_data_port=True, extra_paths=("/start_profile",))
    names = {path.decode().removeprefix("/") for path in fanout_paths(settings)}
    assert names == {*OPERATIONS, "get_loads", "engine_metrics"} - {"start_profile"}
    assert fanout_paths(Settings(runtime_dir="", state_dir="")) == frozenset()
