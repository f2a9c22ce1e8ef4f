"""/docs, /openapi.json, /openapi-data.json: what the APIs are. No token: nothing of this installation is told."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import orjson
from aiohttp import hdrs, web

if TYPE_CHECKING:
    from pointsman.admin_api.openapi.document import JsonObject

_JSON = "application/json"
ADMIN_PATH = "/openapi.json"
DATA_PATH = "/openapi-data.json"
PAGE_PATH = "/docs"


class DocsHandlers:
    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(ADMIN_PATH, self.admin),
            web.get(DATA_PATH, self.data),
            web.get(PAGE_PATH, self.page),
        ]

    async def admin(self, _request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(_documents()[ADMIN_PATH]), content_type=_JSON)

    async def data(self, _request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(_documents()[DATA_PATH]), content_type=_JSON)

    async def page(self, _request: web.Request) -> web.Response:
        text, policy = _page()
        headers = {hdrs.CONTENT_TYPE: "text/html; charset=utf-8", "Content-Security-Policy": policy}
        return web.Response(text=text, headers=headers)


# What documents are made of takes control 40 ms to import, and hardly anybody asks for them: not at every start.


@cache
def _documents() -> dict[str, JsonObject]:
    from pointsman.admin_api.openapi.admin import admin_document
    from pointsman.admin_api.openapi.data import data_document

    return {ADMIN_PATH: admin_document(), DATA_PATH: data_document()}


@cache
def _page() -> tuple[str, str]:
    """And its Content-Security-Policy."""
    from pointsman.admin_api.openapi.page import POLICY, page

    return page(_documents()), POLICY
