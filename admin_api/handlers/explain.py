"""Why requests go where: /explain for one that is not sent, /decisions and /workers/ID/why for those that were."""

from __future__ import annotations

import re

from aiohttp import web

from pointsman.admin_api.answers import answer, bad_request
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.queries import check_parameters
from pointsman.admin_api.schemas import read_explain
from pointsman.config.worker_urls import canonical_url

MAX_LIMIT = 1000
MAX_LAST_S = 7 * 86400.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class ExplainHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/explain", self.explain),
            web.get("/decisions", self.decisions),
            web.get("/decisions/{id}", self.decision),
            web.get("/workers/{key:.+}/why", self.why),
        ]

    async def explain(self, request: web.Request) -> web.Response:
        return answer(self._port.explain(read_explain(await request.read())))

    async def decisions(self, request: web.Request) -> web.Response:
        check_parameters(request, ("limit", "worker"))
        limit = request.query.get("limit", "50")
        if not (limit.isascii() and limit.isdigit() and 0 < int(limit) <= MAX_LIMIT):
            raise bad_request(f"limit: expected 1 to {MAX_LIMIT}, got {limit[:60]!r}")
        worker = request.query.get("worker")
        return answer({"decisions": self._port.decisions(int(limit), None if worker is None else _key(worker))})

    async def decision(self, request: web.Request) -> web.Response:
        return answer(self._port.decision(request.match_info["id"]))

    async def why(self, request: web.Request) -> web.Response:
        check_parameters(request, ("last",))
        return answer(self._port.why(_key(request.match_info["key"]), seconds(request.query.get("last", "10m"))))


def seconds(text: str) -> float:
    """`90`, `90s`, `10m`, `1.5h`. Raises RequestError 400."""
    found = _DURATION.fullmatch(text.strip())
    value = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < value <= MAX_LAST_S:
        raise bad_request(f"last: expected a time like 90s, 10m or 2h, at most 7 days, got {text[:60]!r}")
    return value


def _key(text: str) -> str:
    """The id, or the worker's URL in its canonical spelling."""
    try:
        return canonical_url(text) if "://" in text else text
    except ValueError:
        return text
