"""/config: which configuration is in force, reading the files again, and going back in its history."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer, bad_request
from pointsman.admin_api.callers import CALLER
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.queries import check_parameters
from pointsman.admin_api.schemas import ApplyBody, RollbackBody, read_body

MAX_GENERATION = 2**53


class ConfigHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/config", self.get),
            web.get("/config/history", self.history),
            web.get("/config/history/{generation}", self.generation),
            web.get("/config/diff", self.diff),
            web.post("/config/reload", self.reload),
            web.post("/config/rollback", self.rollback),
            web.post("/config/apply", self.apply),
            web.post("/config/confirm", self.confirm),
            web.post("/config/release", self.release),
        ]

    async def get(self, _request: web.Request) -> web.Response:
        return answer(self._port.config())

    async def history(self, _request: web.Request) -> web.Response:
        return answer(self._port.config_history())

    async def generation(self, request: web.Request) -> web.Response:
        number = _number("generation", request.match_info["generation"])
        return answer(self._port.config_generation(number))

    async def diff(self, request: web.Request) -> web.Response:
        check_parameters(request, ("from", "to"))
        before, after = request.query.get("from"), request.query.get("to")
        if before is None:
            raise bad_request("expected ?from=GENERATION")
        return answer(self._port.config_diff(_number("from", before), None if after is None else _number("to", after)))

    async def reload(self, _request: web.Request) -> web.Response:
        """422 when the files were refused: the body says why, and what goes on in force."""
        view = await self._port.reload()
        return answer(view, status=200 if view.last_reload_ok else 422)

    async def rollback(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), RollbackBody)
        return answer(await self._port.rollback(body.generation, request[CALLER].name))

    async def apply(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), ApplyBody)
        return answer(await self._port.apply(body.to_request(), request[CALLER].name))

    async def confirm(self, request: web.Request) -> web.Response:
        return answer(await self._port.confirm(request[CALLER].name))

    async def release(self, request: web.Request) -> web.Response:
        return answer(await self._port.release(request[CALLER].name))


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 16 and 0 < int(text) <= MAX_GENERATION):
        raise bad_request(f"{name}: expected the number of a generation, got {text[:60]!r}")
    return int(text)
