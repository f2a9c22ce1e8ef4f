"""Every request that may change something leaves one line: who, what, from where, and what it changed from and to.

Before and after are of what the request is about: the worker, the configuration, the pause, the log. What an engine is
asked to do changes nothing of ours, so such a line has neither. No query, no body and no key is in it: keys may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pointsman.admin_api import peers
from pointsman.admin_api.callers import CALLER, route_of
from pointsman.admin_api.changes import CHANGING
from pointsman.admin_api.ports import ControlPort
from pointsman.config.worker_urls import canonical_url
from pointsman.daemon.errors import RequestError
from pointsman.daemon.telemetry.logs import audit

MAX_STATE_BYTES = 1200
"""Of before and of after: a log line has to hold both."""

State = Mapping[str, Any] | None
_Look = Callable[[ControlPort, web.Request, bytes], State]
"""(port, request, its body)"""

BEFORE: Final = web.RequestKey("before", dict)
AFTER: Final = web.RequestKey("after", dict)


def observed(port: ControlPort) -> Middleware:
    """Notes what a change changes. Comes after the body: a new worker's URL is in it."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        look = _looks_at(request)
        if look is None:
            return await handler(request)
        body = await request.read()
        request[BEFORE] = {"state": look(port, request, body)}
        try:
            return await handler(request)
        finally:
            request[AFTER] = {"state": look(port, request, body)}

    return observe


def write_line(request: web.Request, status: int) -> None:
    if request.method not in CHANGING:
        return
    caller = request.get(CALLER)
    fields: dict[str, object] = {
        "who": None if caller is None else caller.name,
        "scope": None if caller is None else caller.scope.name.lower(),
        "peer": peers.describe(request),
        "method": request.method,
        "path": request.path,  # without the query: an API key may be in it
        "status": status,
    }
    if BEFORE in request:
        fields |= {"before": _bounded(request[BEFORE]["state"]), "after": _bounded(request.get(AFTER, {}).get("state"))}
    audit(**fields)


def _bounded(state: State) -> object:
    text = orjson.dumps(state)
    return state if len(text) <= MAX_STATE_BYTES else text[:MAX_STATE_BYTES].decode("utf-8", "ignore") + "…"


# --- what a request is about


def _looks_at(request: web.Request) -> _Look | None:
    route = route_of(request)
    if request.method not in CHANGING or route is None:
        return None
    return _worker if route.startswith("/workers/") else _LOOKS.get(route)


def _worker(port: ControlPort, request: web.Request, _: bytes) -> State:
    return _settings(port, request.match_info["key"])


def _worker_of_query(port: ControlPort, request: web.Request, _: bytes) -> State:
    return _settings(port, request.query.get("url", ""))


def _worker_of_body(port: ControlPort, _: web.Request, body: bytes) -> State:
    try:
        url = orjson.loads(body)["url"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return _settings(port, url) if isinstance(url, str) else None


def _settings(port: ControlPort, key: str) -> State:
    """None: there is no such worker."""
    try:
        return port.worker_settings(_canonical(key))
    except RequestError:
        return None


def _canonical(key: str) -> str:
    try:
        return canonical_url(key) if urlsplit(key).scheme else key
    except ValueError:
        return key


def _config(port: ControlPort, _request: web.Request, _body: bytes) -> State:
    view = port.config()
    held = {held.kind: {"what": held.what, "confirm_by": held.confirm_by} for held in view.held}
    return {"generation": view.generation, "hash": view.hash[:12], "held": held}


def _pause(port: ControlPort, _request: web.Request, _body: bytes) -> State:
    return {"mode": port.status().pause.mode}


def _log(port: ControlPort, _request: web.Request, _body: bytes) -> State:
    found: dict[str, Any] = msgspec.to_builtins(port.log_settings())
    return found


_LOOKS: Final[Mapping[str, _Look]] = {
    "/workers": _worker_of_body,
    "/add_worker": _worker_of_query,
    "/remove_worker": _worker_of_query,
    "/config/reload": _config,
    "/config/rollback": _config,
    "/config/apply": _config,
    "/config/confirm": _config,
    "/config/release": _config,
    "/pause": _pause,
    "/resume": _pause,
    "/log-level": _log,
}
