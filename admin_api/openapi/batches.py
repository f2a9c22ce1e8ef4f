"""OpenAI's Files and Batches API on the data port: there with `batch_store`, else 404."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from pointsman.admin_api.openapi.document import JSON, Answer, Body, JsonObject, Operation, Parameter, Shape
from pointsman.admin_api.openapi.errors import GatewayError


class File(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None


class Files(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"]
    deleted: bool


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    total: int
    completed: int
    failed: int


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What is the gateway's alone stands under `pointsman`."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    pointsman: dict[str, Any]


class Batches(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


_FAILURES: Mapping[int, Answer] = MappingProxyType(
    {
        status: Answer(text, {JSON: GatewayError})
        for status, text in {
            400: "The message names the field, and what was expected.",
            401: "No API key, or an unknown one.",
            404: "There is none, or it belongs to another key; batches_off: no batch_store.",
            409: "file_in_use, batch_is_final.",
            413: "file_too_large, quota_exceeded, payload_too_large.",
            429: "too_many_batches of one key.",
            500: "content_lost: the store has lost it.",
            503: "batches_unavailable, storage_unavailable: ask again.",
            507: "storage_full.",
        }.items()
    }
)
_ID = Parameter("id", "path", "As answered when it was made.")


def _paged(most: int, usual: int) -> tuple[Parameter, ...]:
    limit = {"type": "integer", "minimum": 1, "maximum": most, "default": usual}
    return (
        Parameter("after", "query", "Id of the last one of the page before."),
        Parameter("limit", "query", "How many.", limit),
        Parameter("order", "query", "By when they were made.", {"type": "string", "enum": ["asc", "desc"]}),
    )


def _operation(
    method: str,
    path: str,
    summary: str,
    shape: Shape,
    *failures: int,
    parameters: tuple[Parameter, ...] = (),
    body: Body | None = None,
    content_type: str = JSON,
) -> Operation:
    return Operation(
        method=method,
        path=path,
        tag="files and batches",
        summary=summary,
        parameters=parameters,
        body=body,
        answers={200: Answer("Done.", {content_type: shape})}
        | {status: _FAILURES[status] for status in (400, 401, 404, 503, *failures)},
    )


_UPLOAD: JsonObject = {
    "type": "object",
    "properties": {
        "purpose": {"type": "string", "enum": ["batch"]},
        "file": {"type": "string", "format": "binary", "description": "Lines of JSON, one request each."},
    },
    "required": ["purpose", "file"],
}
_NEW: JsonObject = {
    "type": "object",
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"type": "string"},
        "completion_window": {"type": "string"},
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["input_file_id", "endpoint", "completion_window"],
}
BATCH_OPERATIONS = (
    _operation(
        "POST", "/v1/files", "Keep a file", File, 413, 507, body=Body(_UPLOAD, content_type="multipart/form-data")
    ),
    _operation("GET", "/v1/files", "The files of this key", Files, parameters=_paged(10_000, 10_000)),
    _operation("GET", "/v1/files/{id}", "One file", File, parameters=(_ID,)),
    _operation(
        "GET",
        "/v1/files/{id}/content",
        "What is in it",
        {"type": "string", "format": "binary"},
        500,
        parameters=(_ID,),
        content_type="application/octet-stream",
    ),
    _operation("DELETE", "/v1/files/{id}", "Forget a file", DeletedFile, 409, parameters=(_ID,)),
    _operation("POST", "/v1/batches", "Run the requests of a file", Batch, 413, 429, 507, body=Body(_NEW)),
    _operation("GET", "/v1/batches", "The batches of this key", Batches, parameters=_paged(100, 20)),
    _operation("GET", "/v1/batches/{id}", "One batch", Batch, parameters=(_ID,)),
    _operation("POST", "/v1/batches/{id}/cancel", "Stop a batch", Batch, 409, parameters=(_ID,)),
)
