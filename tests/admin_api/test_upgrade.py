"""POST /upgrade, and what becomes of other changes while another daemon takes over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import Trusting
from pointsman.admin_api.changes import Changes
from pointsman.admin_api.ports import WorkerRequest, WorkerView
from tests.fakes.control_port import UPGRADED, FakeControlPort, error

Connect = Callable[[web.Application], Awaitable[Any]]
WORKER = {"url": "http://10.0.0.1:8000"}


@pytest.mark.parametrize(("body", "timeout_s"), [(None, 60.0), ({}, 60.0), ({"timeout_s": 5}, 5.0)])
async def test_it_is_answered_when_it_is_over(
    client: Any, port: FakeControlPort, body: dict[str, float] | None, timeout_s: float
) -> None:
    response = await client.post("/upgrade", json=body)
    assert response.status == 200
    assert (await response.json())["pid"] == UPGRADED.pid
    assert port.calls == [("upgrade", timeout_s)]


@pytest.mark.parametrize("body", [{"timeout_s": 0}, {"timeout_s": 1e6}, {"timeout_s": "x"}, {"timeout": 5}, []])
async def test_a_bad_body_starts_nothing(client: Any, port: FakeControlPort, body: Any) -> None:
    response = await client.post("/upgrade", json=body)
    assert response.status == 400
    assert port.calls == []


async def test_a_failure_is_the_ports_word(client: Any, port: FakeControlPort) -> None:
    port.breaks_with = error(500, "UPGRADE_FAILED", "it ended before it was ready")
    response = await client.post("/upgrade")
    assert response.status == 500
    assert (await response.json())["code"] == "UPGRADE_FAILED"


class SlowPort(FakeControlPort):
    """Adding a worker takes as long as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Event()

    async def add_worker(self, request: WorkerRequest) -> WorkerView:
        self.has_begun.set()
        await self.may_end.wait()
        return await super().add_worker(request)


async def test_changes_under_way_are_finished_and_later_ones_refused(aiohttp_client: Connect) -> None:
    port, changes = SlowPort(), Changes()
    client = await aiohttp_client(build_app(port, auth=Trusting(), changes=changes))
    adding = asyncio.create_task(client.post("/workers", json=WORKER))
    await port.has_begun.wait()
    closing = asyncio.create_task(changes.close(wait_s=10))
    await asyncio.sleep(0)

    late = await client.post("/workers", json={"url": "http://10.0.0.2:8000"})
    assert (late.status, (await late.json())["code"], late.headers["Retry-After"]) == (503, "UPGRADING", "1")
    assert (await client.get("/workers")).status == 200, "looking changes nothing"
    assert not closing.done()

    port.may_end.set()
    assert (await adding).status == 202
    await asyncio.wait_for(closing, 5)
    assert [worker.url for worker in port.live] == [WORKER["url"]]


async def test_the_upgrade_itself_is_not_waited_for(aiohttp_client: Connect) -> None:
    changes = Changes()

    class Upgrading(FakeControlPort):
        async def upgrade(self, timeout_s: float) -> Any:
            await changes.close(wait_s=10)
            return UPGRADED

    client = await aiohttp_client(build_app(Upgrading(), auth=Trusting(), changes=changes))
    async with asyncio.timeout(30):
        assert (await client.post("/upgrade")).status == 200


async def test_a_change_that_lasts_is_not_waited_for_forever(aiohttp_client: Connect) -> None:
    port, changes = SlowPort(), Changes()
    client = await aiohttp_client(build_app(port, auth=Trusting(), changes=changes))
    adding = asyncio.create_task(client.post("/workers", json=WORKER))
    await port.has_begun.wait()
    await changes.close(wait_s=0.01)
    assert not adding.done()
    port.may_end.set()
    assert (await adding).status == 202
