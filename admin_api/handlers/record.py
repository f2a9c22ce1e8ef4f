"""/record: the live traffic as a trace, for as long as somebody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from aiohttp import web

from pointsman.admin_api.answers import answer
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.schemas import RecordBody, read_body

LINES_TYPE = "application/x-ndjson"
WRITE_TIMEOUT_S = 30.0
"""for a reader that has stopped reading"""


class RecordHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/record", self.record), web.delete("/record", self.stop)]

    async def record(self, request: web.Request) -> web.StreamResponse:
        """Lines of JSON: a trace, and a last line that says what is not in it. Broken off without that line."""
        body = read_body(await request.read(), RecordBody)
        async with aclosing(self._port.record(body.minutes * 60)) as lines:
            first = await anext(lines)  # what refuses a recording does so here: still an error as any other
            response = web.StreamResponse(headers={"Content-Type": LINES_TYPE})
            await response.prepare(request)
            try:
                await _write(response, first)
                await _write_all(response, lines)
            except (ConnectionError, TimeoutError):
                if request.transport is not None:
                    request.transport.abort()
        return response

    async def stop(self, _request: web.Request) -> web.Response:
        """What runs is waited for; the one who records gets the rest."""
        self._port.stop_recording()
        return answer({"status": "accepted"}, status=202)


async def _write_all(response: web.StreamResponse, lines: AsyncIterator[bytes]) -> None:
    async for line in lines:
        await _write(response, line)
    await response.write_eof()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(data)
