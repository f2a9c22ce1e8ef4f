"""How the admin API is served: aiohttp's runner with deadlines and bounds, and without its name and version.

Answers to requests that are not HTTP are made below the application, so no middleware and no signal sees them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from pointsman.admin_api.answers import answer, error_body

HEAD_TIMEOUT_S = 20.0
"""For a request's head to arrive, and for the next one on a connection (aiohttp has one deadline for both)."""
LINGER_S = 2.0
"""how long the rest of a refused body is read and thrown away, so that the client sees the answer"""
MAX_LINE_BYTES = 8190


class _Connection(RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """For what the parser refuses. Its own message quotes the request, so it is not repeated."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        response = answer(error_body(HTTPStatus(status).phrase.lower(), "BAD_HTTP"), status=status)
        response.headers[hdrs.SERVER] = "pointsman"
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class AdminRunner(web.AppRunner):
    """Serve an application of `build_app` with this."""

    def __init__(self, app: web.Application, **overrides: Any) -> None:
        options: dict[str, Any] = {
            "keepalive_timeout": HEAD_TIMEOUT_S,
            "lingering_time": LINGER_S,
            "max_line_size": MAX_LINE_BYTES,
            "max_field_size": MAX_LINE_BYTES,
            "auto_decompress": False,
            "access_log": None,
            "shutdown_timeout": 2.0,
        }
        super().__init__(app, handle_signals=False, **(options | overrides))

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # aiohttp has no option for the class of connections
        return server
