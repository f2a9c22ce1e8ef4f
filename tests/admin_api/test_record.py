"""POST and DELETE /record over a fake daemon: lines as they come, errors as any others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.fakes.control_port import FakeControlPort, error

LINES = (b'{"block_size":128}\n', b'{"input_length":1}\n', b"\n", b'{"recorded":1}\n')


async def test_the_lines_come_as_they_are(client: Any, port: FakeControlPort) -> None:
    port.recording = LINES
    response = await client.post("/record", json={"minutes": 0.5})
    assert (response.status, response.headers["Content-Type"]) == (200, "application/x-ndjson")
    assert await response.read() == b"".join(LINES)
    assert port.calls == [("record", 30)]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "minutes"),
        ({"minutes": 0}, "minutes"),
        ({"minutes": 100_000}, "at most 1440"),
        ({"minutes": "10"}, "minutes"),
        ({"minutes": 1, "minute": 1}, "minute"),
    ],
)
async def test_a_bad_length_is_400_and_nothing_begins(
    client: Any, port: FakeControlPort, body: dict[str, Any], complaint: str
) -> None:
    response = await client.post("/record", json=body)
    assert response.status == 400
    assert complaint in (await response.json())["error"]
    assert port.calls == []


async def test_a_refusal_is_an_answer_and_no_broken_stream(client: Any, port: FakeControlPort) -> None:
    port.breaks_with = error(409, "RECORDING_RUNS", "somebody records already")
    response = await client.post("/record", json={"minutes": 1})
    assert (response.status, (await response.json())["code"]) == (409, "RECORDING_RUNS")


async def test_stopping(client: Any, port: FakeControlPort) -> None:
    assert (await client.delete("/record")).status == 202
    port.breaks_with = error(404, "NO_RECORDING", "nobody records")
    assert (await client.delete("/record")).status == 404


class _Endless(FakeControlPort):
    async def record(self, seconds: float) -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"\n"
                await asyncio.sleep(0.001)
        finally:
            self.calls.append(("closed", None))
            self.closed.set()

    closed: asyncio.Event


async def test_a_reader_that_leaves_ends_the_recording(aiohttp_client: Any) -> None:
    from pointsman.admin_api.app import build_app
    from pointsman.admin_api.auth import Trusting

    port = _Endless()
    port.closed = asyncio.Event()
    client = await aiohttp_client(build_app(port, auth=Trusting()))
    response = await client.post("/record", json={"minutes": 1})
    assert await response.content.readline() == b"\n"
    response.close()
    async with asyncio.timeout(30):
        await port.closed.wait()


async def test_the_index_names_it(client: Any) -> None:
    index = await (await client.get("/")).text()
    assert json.dumps({"minutes": 10}) in index
