"""/docs, /openapi.json, /openapi-data.json: what the APIs are. No token: nothing of this installation is told."""

from __future__ import annotations

from functools import cache

import orjson
from aiohttp import hdrs, web

from pointsman.admin_api.openapi.admin import admin_document
from pointsman.admin_api.openapi.data import data_document
from pointsman.admin_api.openapi.document import JSON, JsonObject
from pointsman.admin_api.openapi.page import POLICY, page

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
        return web.Response(body=orjson.dumps(_documents()[ADMIN_PATH]), content_type=JSON)

    async def data(self, _request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(_documents()[DATA_PATH]), content_type=JSON)

    async def page(self, _request: web.Request) -> web.Response:
        headers = {hdrs.CONTENT_TYPE: "text/html; charset=utf-8", "Content-Security-Policy": POLICY}
        return web.Response(text=_page(), headers=headers)


@cache
def _documents() -> dict[str, JsonObject]:
    return {ADMIN_PATH: admin_document(), DATA_PATH: data_document()}


@cache
def _page() -> str:
    return page(_documents())
