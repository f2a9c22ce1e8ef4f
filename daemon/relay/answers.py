"""Answers that the shard gives by itself."""

from __future__ import annotations

from http import HTTPStatus

import orjson

from pointsman.daemon.errors import RequestError

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EVENT_STREAM_ERROR_PREFIX = b"data: "
LAST_CHUNK = b"0\r\n\r\n"

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def error_body(error: RequestError) -> bytes:
    """OpenAI's shape; the SDK raises the matching exception with this message."""
    content = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": content})


def error_event(error: RequestError) -> bytes:
    """A complete server-sent event; never followed by `[DONE]`."""
    return EVENT_STREAM_ERROR_PREFIX + error_body(error) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def render(
    status: int,
    body: bytes,
    *,
    content_type: bytes = JSON,
    request_id: bytes,
    keep_alive: bool,
    is_http_1_0: bool = False,
    is_head: bool = False,
    headers: tuple[tuple[str, str], ...] = (),
) -> bytes:
    lines = [
        b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"")),
        b"Content-Type: " + content_type,
        b"Content-Length: %d" % len(body),
        b"X-Request-Id: " + request_id,
    ]
    lines += [f"{name}: {value}".encode("latin-1", "replace") for name, value in headers]
    if not keep_alive:
        lines.append(b"Connection: close")
    elif is_http_1_0:
        lines.append(b"Connection: keep-alive")
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    return head if is_head else head + body
