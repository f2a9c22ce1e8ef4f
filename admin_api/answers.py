"""The shapes of answers: JSON, and one error shape for whatever goes wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from aiohttp import web

from pointsman.daemon.errors import Fault, RequestError

_PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


def answer(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`value` may hold msgspec structs. Indented: people read it from curl."""
    body = orjson.dumps(msgspec.to_builtins(value), option=_PRETTY)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json", charset="utf-8")


def text(message: str, *, status: int = 200) -> web.Response:
    return web.Response(text=message, status=status)


def error_body(message: str, code: str) -> dict[str, Any]:
    return {"error": message, "code": code}


def refusal(error: RequestError) -> web.Response:
    response = answer(error_body(error.message, error.code), status=error.status, headers=dict(error.headers))
    if error.close:
        response.force_close()
    return response


def refused(
    status: int, code: str, message: str, *, headers: tuple[tuple[str, str], ...] = (), close: bool = False
) -> RequestError:
    """An error of the admin API's own; codes are in capitals here, as SGLang's gateways write them."""
    return RequestError(status, code, message, fault=Fault.CLIENT, headers=headers, close=close)


def bad_request(message: str) -> RequestError:
    return refused(400, "BAD_REQUEST", message)
