"""/pause and /resume: the barrier over all shards."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.schemas import PauseBody, read_body


class PauseHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/pause", self.pause), web.post("/resume", self.resume)]

    async def pause(self, request: web.Request) -> web.Response:
        data = await request.read()
        body = read_body(data, PauseBody) if data.strip() else PauseBody()
        return answer(await self._port.pause(body.mode, body.reason))

    async def resume(self, _request: web.Request) -> web.Response:
        return answer(self._port.resume())
