"""/config: which configuration is in force, and reading the files again."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer
from pointsman.admin_api.ports import ControlPort


class ConfigHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/config", self.get), web.post("/config/reload", self.reload)]

    async def get(self, _request: web.Request) -> web.Response:
        return answer(self._port.config())

    async def reload(self, _request: web.Request) -> web.Response:
        """422 when the files were refused: the body says why, and what goes on in force."""
        view = await self._port.reload()
        return answer(view, status=200 if view.last_reload_ok else 422)
