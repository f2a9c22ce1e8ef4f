"""One line of an output or error file. Pure: bytes in, bytes out; a worker's answer stays as it came.

Every line has `id`, `custom_id`, `response` (None when nothing answered) and `error` (None only when the request
succeeded).
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from pointsman.daemon.batches.attempts import Answer

_encode = msgspec.json.Encoder().encode
_check = msgspec.json.Decoder(Raw).decode
MAX_MESSAGE = 2000


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: Raw | str


class LineError(msgspec.Struct, frozen=True):
    """Why a line has no successful answer."""

    code: str
    message: str


class _Line(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: LineError | None


EXPIRED = LineError("batch_expired", "the completion window was over before this request was run")
CANCELLED = LineError("batch_cancelled", "the batch was cancelled before this request was run")
LOST = LineError("result_lost", "this request was run, but the payload store has lost its result")


def line_id(batch_id: str, number: int) -> str:
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


def render(batch_id: str, number: int, custom_id: str, answer: Answer | None, error: LineError | None) -> bytes:
    """With its line end."""
    response = None if answer is None else _Response(answer.status, answer.request_id, _body(answer.body))
    return _encode(_Line(line_id(batch_id, number), custom_id, response, error)) + b"\n"


def _body(body: bytes) -> Raw | str:
    """The JSON that came, on one line; what is no JSON comes as text."""
    try:
        _check(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body[:MAX_MESSAGE].decode("utf-8", "replace")
    if b"\n" in body or b"\r" in body:  # JSON has line ends between tokens only
        body = body.replace(b"\n", b" ").replace(b"\r", b" ")
    return Raw(body)


class _Outcome(msgspec.Struct):
    error: object


def has_succeeded(line: bytes) -> bool:
    """Of a line that `render` has made."""
    return msgspec.json.decode(line, type=_Outcome).error is None
