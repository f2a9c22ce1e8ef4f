"""One line of a batch's input file: what it must have, and what is wrong with it. Pure."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

from pointsman.daemon.batches.grouping import group_key
from pointsman.daemon.errors import PointsmanError, RequestError
from pointsman.daemon.routing.request import json_features

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/generate")
MAX_CUSTOM_ID = 512
_WITHOUT_MODEL = ("/generate",)
"""SGLang's own endpoint: the model is whatever the engine serves"""


class LineProblem(PointsmanError):
    """One defect of one line; `code` and `param` as in OpenAI's batch errors. Lines count from 1."""

    def __init__(self, line: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.line, self.code, self.message, self.param = line, code, message, param


class InputLine(msgspec.Struct, frozen=True):
    custom_id: str
    group: bytes
    """see `grouping`"""
    body: Raw
    """the request, byte for byte as it stands in the file"""


class _Fields(msgspec.Struct):
    custom_id: object = UNSET
    method: object = UNSET
    url: object = UNSET
    body: Raw | UnsetType = UNSET


_decode = msgspec.json.Decoder(_Fields).decode


def read_line(raw: bytes, number: int, endpoint: str) -> InputLine:
    """`raw` without its line end. Raises LineProblem."""
    fields = _fields(raw, number)
    custom_id = fields.custom_id
    if not isinstance(custom_id, str) or not custom_id:
        raise _missing(number, "custom_id", "a string that is not empty")
    if len(custom_id) > MAX_CUSTOM_ID:
        raise LineProblem(
            number, "invalid_custom_id", f"custom_id has more than {MAX_CUSTOM_ID} characters", "custom_id"
        )
    if fields.method != "POST":
        raise LineProblem(number, "invalid_method", f"method must be POST, not {_shown(fields.method)}", "method")
    if fields.url != endpoint:
        message = f"url must be the batch's endpoint {endpoint}, not {_shown(fields.url)}"
        raise LineProblem(number, "mismatched_url", message, "url")
    if fields.body is UNSET:
        raise _missing(number, "body", "the request as a JSON object")
    return InputLine(custom_id, _group(fields.body, number, endpoint), fields.body)


def request_body(raw: bytes) -> bytes:
    """Of a line that `read_line` has accepted."""
    fields = _decode(raw)
    assert fields.body is not UNSET
    return bytes(fields.body)


def _fields(raw: bytes, number: int) -> _Fields:
    try:
        return _decode(raw)
    except msgspec.ValidationError:
        raise LineProblem(number, "invalid_line", "the line is not a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineProblem(number, "invalid_json_line", f"the line is not valid JSON: {error}") from None


def _group(body: Raw, number: int, endpoint: str) -> bytes:
    try:
        features = json_features(bytes(body))
    except RequestError as error:
        raise LineProblem(number, "invalid_body", error.message, "body") from None
    if features.is_stream:
        raise LineProblem(
            number, "stream_not_allowed", "a line of a batch cannot be streamed: remove stream", "body.stream"
        )
    if not features.model and endpoint not in _WITHOUT_MODEL:
        raise _missing(number, "body.model", "the name of a model")
    return group_key(features)


def _missing(number: int, param: str, what: str) -> LineProblem:
    return LineProblem(number, "missing_required_parameter", f"{param} is required: {what}", param)


def _shown(value: object) -> str:
    return "missing" if value is UNSET else repr(value)[:80]


def url_of(raw: bytes, number: int) -> str:
    """The endpoint that a line is for. Raises LineProblem."""
    url = _fields(raw, number).url
    if url not in ENDPOINTS:
        message = f"url must be one of {', '.join(ENDPOINTS)}, not {_shown(url)}"
        raise LineProblem(number, "invalid_url", message, "url")
    return str(url)
