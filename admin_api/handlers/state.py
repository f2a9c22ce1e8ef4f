"""/state: what routing has learned, as a file that the next daemon begins with."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer
from pointsman.admin_api.ports import ControlPort


class StateHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/state/snapshot", self.save)]

    async def save(self, _request: web.Request) -> web.Response:
        return answer(await self._port.save_state())
