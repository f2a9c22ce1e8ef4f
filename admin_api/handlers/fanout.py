"""What SGLang's gateways ask of all their workers at once, under their names: cache, pauses, weights, memory, profiles.

200 all did it, 206 some did (or the others have no such operation), 502 nobody did. The body says who did what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from aiohttp import hdrs, web

from pointsman.admin_api.answers import answer, bad_request
from pointsman.admin_api.handlers.probes import METRICS_TYPE
from pointsman.admin_api.ports import ControlPort, FanoutRequest, FanoutView, TargetResult
from pointsman.admin_api.queries import check_parameters

OPERATIONS = (
    "flush_cache",
    "abort_request",
    "pause_generation",
    "continue_generation",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "release_memory_occupation",
    "resume_memory_occupation",
    "start_profile",
    "stop_profile",
)
MAX_TIMEOUT_S = 3600.0
MAX_NAMED = 255
_QUERY = ("worker", "model", "timeout_s", "include_down")
_YES_NO: Mapping[str, bool] = MappingProxyType({"1": True, "true": True, "0": False, "false": False})


class FanoutHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(f"/{{operation:{'|'.join(OPERATIONS)}}}", self.run),
            web.get("/get_loads", self.loads),
            web.get("/engine_metrics", self.metrics),
        ]

    async def run(self, request: web.Request) -> web.Response:
        view = await self._port.fan_out(_request(request, request.match_info["operation"], await request.read()))
        return answer(_shown(view) | _for_sglang(view), status=_status(view))

    async def loads(self, request: web.Request) -> web.Response:
        view = await self._port.engine_loads(_request(request, "get_loads"))
        return answer({"workers": view.workers} | _shown(view.fanout), status=_status(view.fanout))

    async def metrics(self, request: web.Request) -> web.Response:
        """200 as soon as one page is there: Prometheus takes nothing of a 206. A gauge tells whose are missing."""
        view = await self._port.engine_metrics(_request(request, "engine_metrics"))
        if _status(view.fanout) == 502:
            return answer(_shown(view.fanout), status=502)
        return web.Response(body=view.page, headers={hdrs.CONTENT_TYPE: METRICS_TYPE})


# --- in


def _request(request: web.Request, operation: str, body: bytes = b"") -> FanoutRequest:
    """Raises RequestError 400."""
    query = request.query
    check_parameters(request, _QUERY)
    for name in query:
        if name != "worker" and len(query.getall(name)) > 1:
            raise bad_request(f"{name} occurs more than once")
    return FanoutRequest(
        operation=operation,
        body=body,
        workers=_workers(query.getall("worker", [])),
        model=query.get("model"),
        timeout_s=_timeout(query.get("timeout_s")),
        include_down=_flag("include_down", query.get("include_down", "0")),
    )


def _workers(named: list[str]) -> tuple[str, ...]:
    if len(named) > MAX_NAMED:
        raise bad_request(f"at most {MAX_NAMED} workers can be named")
    if "" in named:  # an empty list would mean all of them
        raise bad_request("worker: expected an id or a URL")
    return tuple(named)


def _timeout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise bad_request(f"timeout_s: expected seconds, above 0 and at most {MAX_TIMEOUT_S:g}")
    return seconds


def _flag(name: str, text: str) -> bool:
    if text.lower() not in _YES_NO:
        raise bad_request(f"{name}: expected 1 or 0")
    return _YES_NO[text.lower()]


# --- out


def _of(view: FanoutView, outcome: str) -> list[TargetResult]:
    return [result for result in view.results if result.outcome == outcome]


def _status(view: FanoutView) -> int:
    """Nobody there is no failure, as in SGLang's gateways."""
    succeeded = len(_of(view, "succeeded"))
    if succeeded == len(view.results):
        return 200
    return 206 if succeeded else 502


_WORDS: Mapping[int, str] = MappingProxyType({200: "success", 206: "partial_success", 502: "failure"})


def _shown(view: FanoutView) -> dict[str, Any]:
    succeeded, failed, unsupported = (_of(view, name) for name in ("succeeded", "failed", "unsupported"))
    counts = f"{len(succeeded)} of {len(view.results)} workers did it"
    rest = f"{len(failed)} failed, {len(unsupported)} have no such operation"
    return {
        "status": _WORDS[_status(view)],
        "message": f"{view.operation}: {counts}" + (f"; {rest}" if failed or unsupported else ""),
        "operation": view.operation,
        "timeout_s": view.timeout_s,
        "succeeded": [result.url for result in succeeded],
        "failed": [{"worker": result.url, "error": result.error} for result in failed],
        "unsupported": [result.url for result in unsupported],
        "results": view.results,
    }


def _for_sglang(view: FanoutView) -> dict[str, Any]:
    """What its clients look for after a flush."""
    if view.operation != "flush_cache":
        return {}
    succeeded = [result.url for result in _of(view, "succeeded")]
    return {
        "successful": succeeded,
        "workers_flushed": len(succeeded),
        "total_http_workers": len(view.results),
        "total_grpc_workers": 0,
        "total_workers": len(view.results),
    }
