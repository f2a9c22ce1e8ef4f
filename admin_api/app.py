"""The admin API as an aiohttp application; the daemon behind it is a `ControlPort`.

    errors -> JSON, audit line  |  guard (Host, Origin, content type, size)  |  who, and with what scope  |  body
        |  counted  |  state before and after  |  handler

Built once per kind of listener, because they differ in whom they trust. Serve it with `server.AdminRunner`.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection
from http import HTTPStatus

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from pointsman.admin_api import auditing, passed_on
from pointsman.admin_api.answers import answer, error_body, refusal
from pointsman.admin_api.auth import AdminAuth, authenticator
from pointsman.admin_api.changes import Changes, counted
from pointsman.admin_api.guard import MAX_BODY_BYTES, body_receiver, guard, guard_of_passed
from pointsman.admin_api.handlers.config import ConfigHandlers
from pointsman.admin_api.handlers.docs import DocsHandlers
from pointsman.admin_api.handlers.explain import ExplainHandlers
from pointsman.admin_api.handlers.fanout import FanoutHandlers
from pointsman.admin_api.handlers.legacy import LegacyHandlers
from pointsman.admin_api.handlers.logs import LogHandlers
from pointsman.admin_api.handlers.pause import PauseHandlers
from pointsman.admin_api.handlers.probes import ProbeHandlers
from pointsman.admin_api.handlers.record import RecordHandlers
from pointsman.admin_api.handlers.state import StateHandlers
from pointsman.admin_api.handlers.status import StatusHandlers
from pointsman.admin_api.handlers.upgrade import UpgradeHandlers
from pointsman.admin_api.handlers.workers import WorkerHandlers
from pointsman.admin_api.ports import ControlPort
from pointsman.daemon.errors import RequestError
from pointsman.daemon.telemetry.logs import log

_SHOWN_FRAMES = 4


def build_app(
    port: ControlPort, *, auth: AdminAuth, host_names: Collection[str] = (), changes: Changes | None = None
) -> web.Application:
    """`host_names`: what may stand in Host beside loopback and the listener's own address."""
    app = web.Application(
        middlewares=[
            _answer_errors,
            guard(host_names),
            authenticator(auth),
            body_receiver(),
            counted(changes or Changes()),
            auditing.observed(port),
        ],
        client_max_size=MAX_BODY_BYTES,
    )
    # a worker's key may hold slashes, so what lies below a worker comes before the worker itself
    every = (
        StatusHandlers,
        ExplainHandlers,
        WorkerHandlers,
        LegacyHandlers,
        ConfigHandlers,
        RecordHandlers,
        PauseHandlers,
        LogHandlers,
        StateHandlers,
        FanoutHandlers,
        UpgradeHandlers,
    )
    for handlers in every:
        app.add_routes(handlers(port).routes())
    app.add_routes(DocsHandlers().routes())
    app.on_response_prepare.append(_set_headers)
    return app


def build_fanout_app(port: ControlPort, *, auth: AdminAuth, changes: Changes) -> web.Application:
    """What the shards pass on from the data port: fan-outs, and nothing else."""
    app = web.Application(
        middlewares=[
            passed_on.from_shard,
            _answer_errors,
            guard_of_passed(),
            authenticator(auth),
            body_receiver(),
            counted(changes),
        ],
        client_max_size=MAX_BODY_BYTES,
    )
    app.add_routes(FanoutHandlers(port).routes())
    app.on_response_prepare.append(_set_headers)
    return app


def build_metrics_app(port: ControlPort) -> web.Application:
    """Metrics and probes for everybody who can connect: nothing here changes anything or tells of requests."""
    app = web.Application(middlewares=[_answer_errors])
    app.add_routes(ProbeHandlers(port).routes())
    app.on_response_prepare.append(_set_headers)
    return app


async def _set_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.popall(hdrs.SERVER, None)
    response.headers[hdrs.CACHE_CONTROL] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except RequestError as error:
        response = refusal(error)
    except web.HTTPException as error:
        response = _from_aiohttp(request, error)
    except Exception as error:  # noqa: BLE001 - boundary: a defect of ours ends this request and nothing else
        _log_defect(request, error)
        response = answer(error_body("internal error; the daemon's log has it", "INTERNAL"), status=500)
    auditing.write_line(request, response.status)
    return response


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> web.Response:
    """404, 405 and 413 come from aiohttp itself."""
    status = HTTPStatus(error.status)
    message = f"{request.method} {request.path[:200]}: {status.phrase.lower()}"
    response = answer(error_body(message, status.name), status=error.status)
    if hdrs.ALLOW in error.headers:
        response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
    return response


def _log_defect(request: web.Request, error: Exception) -> None:
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log(
        "admin_request_failed",
        level="error",
        method=request.method,
        path=request.path,
        reason=f"{type(error).__name__}: {error}"[:300],
        frames=frames[-_SHOWN_FRAMES:],
    )
