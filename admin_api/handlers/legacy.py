"""The first generation of SGLang's worker API: parameters in the query, answers in plain text."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from pointsman.admin_api.answers import answer, bad_request, text
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.schemas import WorkerBody, check
from pointsman.config.worker_urls import canonical_url
from pointsman.daemon.errors import RequestError

_ADD = frozenset({"url", "api_key", "worker_type", "bootstrap_port", "model_id"})


class LegacyHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/add_worker", self.add),
            web.post("/remove_worker", self.remove),
            web.get("/list_workers", self.list),
        ]

    async def add(self, request: web.Request) -> web.Response:
        try:
            view = await self._port.add_worker(check(_parameters(request), WorkerBody).to_request())
        except RequestError as error:
            return text(error.message, status=error.status if error.status >= 500 else 400)
        return text(f"Successfully added worker: {view.url}")

    async def remove(self, request: web.Request) -> web.Response:
        """200 for a worker that nobody knows too: what was wanted holds. Not for one that did not go."""
        url = request.query.get("url")
        if not url:
            return text("expected ?url=", status=400)
        try:
            await self._port.remove_worker(_canonical(url))
        except RequestError as error:
            if error.status != 404:
                return text(error.message, status=error.status)
        return text(f"Successfully removed worker: {url}")

    async def list(self, _request: web.Request) -> web.Response:
        return answer({"urls": [view.url for view in self._port.list_workers()]})


def _parameters(request: web.Request) -> dict[str, Any]:
    """The query as a body. Raises RequestError."""
    given: dict[str, Any] = {name: value for name, value in request.query.items() if name in _ADD and value}
    port = given.get("bootstrap_port")
    if port is not None:
        if not (port.isascii() and port.isdecimal() and len(port) < 6):
            raise bad_request("bootstrap_port: expected a whole number")
        given["bootstrap_port"] = int(port)
    return given


def _canonical(url: str) -> str:
    try:
        return canonical_url(url)
    except ValueError:
        return url
