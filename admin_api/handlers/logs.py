"""/log-level: what is logged, changed while the daemon runs."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer, bad_request
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.schemas import LogBody, read_body


class LogHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/log-level", self.get), web.put("/log-level", self.put)]

    async def get(self, _request: web.Request) -> web.Response:
        return answer(self._port.log_settings())

    async def put(self, request: web.Request) -> web.Response:
        """What the body does not name stays."""
        body = read_body(await request.read(), LogBody)
        if not body.model_fields_set:
            raise bad_request("nothing to change; expected level, access_sample or both")
        return answer(self._port.set_logs(body.level, body.access_sample))
