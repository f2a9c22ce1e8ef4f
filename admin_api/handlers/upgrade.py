"""/upgrade: have the installed version take over from the running one."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer
from pointsman.admin_api.changes import UPGRADE_PATH
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.schemas import UpgradeBody, read_body


class UpgradeHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [web.post(UPGRADE_PATH, self.upgrade)]

    async def upgrade(self, request: web.Request) -> web.Response:
        """Answered by the old daemon, when it is over."""
        data = await request.read()
        body = read_body(data, UpgradeBody) if data.strip() else UpgradeBody()
        return answer(await self._port.upgrade(body.timeout_s))
