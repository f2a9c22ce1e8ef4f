"""The first generation: parameters in the query, plain text back."""

from __future__ import annotations

from typing import Any

import pytest

from pointsman.admin_api.ports import WorkerRequest
from tests.fakes.control_port import FakeControlPort, error

URL = "http://127.0.0.1:8000"


async def test_add_list_remove(client: Any, port: FakeControlPort) -> None:
    added = await client.post("/add_worker", params={"url": URL, "api_key": "k", "worker_type": "decode"})
    assert (added.status, await added.text()) == (200, f"Successfully added worker: {URL}")
    assert port.calls == [("add", WorkerRequest(url=URL, worker_type="decode", api_key="k"))]
    assert await (await client.get("/list_workers")).json() == {"urls": [URL]}
    removed = await client.post("/remove_worker", params={"url": URL + "/"})
    assert (removed.status, await removed.text()) == (200, f"Successfully removed worker: {URL}/")
    assert await (await client.get("/list_workers")).json() == {"urls": []}


@pytest.mark.parametrize(
    "params", [{}, {"url": ""}, {"url": URL, "worker_type": "encode"}, {"url": URL, "bootstrap_port": "x"}]
)
async def test_a_wrong_addition_is_400_text(client: Any, port: FakeControlPort, params: dict[str, str]) -> None:
    response = await client.post("/add_worker", params=params)
    assert (response.status, response.content_type) == (400, "text/plain")
    assert port.live == []


async def test_a_worker_that_exists_is_400_text(client: Any, port: FakeControlPort) -> None:
    port.declare(URL)
    response = await client.post("/add_worker", params={"url": URL})
    assert response.status == 400
    assert "exists" in await response.text()


async def test_our_own_failure_is_not_the_clients(client: Any, port: FakeControlPort) -> None:
    port.breaks_with = error(503, "NOT_NOW", "no shard took it")
    assert (await client.post("/add_worker", params={"url": URL})).status == 503
    assert (await client.post("/remove_worker", params={"url": URL})).status == 503


@pytest.mark.parametrize("url", ["http://127.0.0.1:9999", "not a url"])
async def test_removing_nobody_succeeds(client: Any, url: str) -> None:
    response = await client.post("/remove_worker", params={"url": url})
    assert (response.status, await response.text()) == (200, f"Successfully removed worker: {url}")


async def test_a_worker_that_a_file_owns_does_not_go_and_that_is_said(client: Any, port: FakeControlPort) -> None:
    port.declare(URL, file="/etc/workers.json")
    response = await client.post("/remove_worker", params={"url": URL})
    assert response.status == 409
    assert "/etc/workers.json" in await response.text()


async def test_an_api_key_in_the_query_is_not_logged(client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    await client.post("/add_worker", params={"url": URL, "api_key": "sk-very-secret"})
    output = capfd.readouterr()
    assert '"event":"audit"' in output.err
    assert "sk-very-secret" not in output.err + output.out
