"""Every operation of the port that clients connect to. A test compares this with the shards' routes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from pointsman.admin_api.openapi.batches import BATCH_OPERATIONS
from pointsman.admin_api.openapi.document import (
    JSON,
    TEXT,
    Answer,
    Body,
    Description,
    JsonObject,
    Operation,
    Parameter,
    Shape,
    document,
)
from pointsman.admin_api.openapi.errors import GatewayError

ABOUT = Description(
    title="pointsman, data port",
    text=(
        "What clients send here goes to an engine, and its answer comes back as it is. The engine says what a body may "
        "hold; named here is what the gateway itself reads, adds and answers. With admin_on_data_port the fan-outs "
        "of the admin API are answered here, too, as they are described there."
    ),
    server="http://127.0.0.1:8700",
    server_text="host and port of the settings",
    security={
        "key": {"type": "http", "scheme": "bearer", "description": "A key of api_key_file, where there is one."},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    },
)


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelCards(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[ModelCard]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["ready", "not ready"]
    reason: str | msgspec.UnsetType = msgspec.UNSET
    healthy_workers: int
    total_workers: int


_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        400: "The request cannot be read, or a routing header asks for what does not exist.",
        401: "No API key, or an unknown one.",
        403: "The key, or this place, may not do that.",
        404: "model_not_found: no worker serves it.",
        408: "The body did not arrive in time, or the request waited too long for admission.",
        413: "The body exceeds max_payload_size.",
        429: "A limit: too many requests or tokens, or the queue for admission is full. Retry-After says how long.",
        502: "The worker could not be reached, or its answer cannot be read.",
        503: "No worker can take it now, or the gateway is full. Retry-After says how long.",
        504: "The worker missed a deadline.",
    }
)
_FAILURES = {status: Answer(text, {JSON: GatewayError}) for status, text in _ERRORS.items()}
_ROUTED_FAILURES = {
    status: Answer(f"{text} Or the engine's own answer.", {JSON: (GatewayError, {}), "*/*": {}})
    for status, text in _ERRORS.items()
}

_STEERING = (
    Parameter("config-profile", "header", "Name of a profile, or auto."),
    Parameter("routing-strategy", "header", "Of this request, instead of its profile's.", example="least-request"),
    Parameter("x-session-id", "header", "Requests of one session keep their worker (sticky, consistent_hash)."),
    Parameter("x-smg-routing-key", "header", "The same, as SGLang's gateway calls it."),
    Parameter(
        "x-smg-target-worker",
        "header",
        "The worker at this position, from 0 in declaration order, or none.",
        {"type": "integer", "minimum": 0},
    ),
    Parameter("external-filter", "header", "Only workers with these labels, as in AIBrix.", example="rack=b"),
    Parameter("user", "header", "On whose behalf, for fairness."),
    Parameter("x-request-id", "header", "Kept, and answered; made up when there is none."),
    Parameter(
        "x-pointsman-explain",
        "header",
        "1: the answer tells why it was this worker.",
        {"type": "string", "enum": ["1"]},
    ),
)
_TOLD = {
    "X-Request-Id": "The client's, or ours.",
    "X-Pointsman-Worker": "Id of the worker that answered.",
    "X-Pointsman-Generation": "Number of the configuration that it was routed under.",
}

_MESSAGES = {"type": "array", "items": {"type": "object"}, "minItems": 1}
_TEXTS = {"type": ["string", "array"]}
_READ: Mapping[str, JsonObject] = MappingProxyType(
    {
        "model": {"type": "string", "description": "Chooses the workers; absent: any."},
        "stream": {"type": "boolean"},
        "max_tokens": {"type": "integer", "minimum": 1},
    }
)
_PROMPTS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "/v1/chat/completions": {"messages": _MESSAGES},
        "/v1/completions": {"prompt": _TEXTS},
        "/v1/embeddings": {"input": _TEXTS},
        "/v1/responses": {"input": _TEXTS},
        "/v1/messages": {"messages": _MESSAGES},
        "/v1/rerank": {"query": {"type": "string"}},
        "/rerank": {"query": {"type": "string"}},
        "/v2/rerank": {"query": {"type": "string"}},
        "/v1/score": {},
        "/score": {},
        "/pooling": {"input": _TEXTS},
        "/generate": {"text": _TEXTS},
        "/v1/classify": {"input": _TEXTS},
        "/tokenize": {"prompt": {"type": "string"}},
        "/detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
    }
)
"""By path, what of the body routing goes by beside the fields of every path; empty: the bytes as they are."""


_ENGINES_OWN = Answer("As the engine answers.")


def _routed(path: str, shape: Shape, content_type: str = JSON) -> Operation:
    answer = Answer("As the engine answers: JSON, or events where they were asked for.", headers=_TOLD)
    return Operation(
        method="POST",
        path=path,
        tag="to an engine",
        summary=f"{path}, by the worker that routing chooses",
        parameters=_STEERING,
        body=Body(shape, content_type=content_type),
        answers={200: answer, **_ROUTED_FAILURES},
        otherwise=_ENGINES_OWN,
    )


def _json(path: str, prompt: Mapping[str, Any]) -> Operation:
    return _routed(path, {"type": "object", "properties": {**_READ, **prompt}, "required": list(prompt)})


def _info(path: str, summary: str = "") -> Operation:
    answer = Answer("As the engine answers.", headers=_TOLD)
    return Operation(
        method="GET",
        path=path,
        tag="to an engine",
        summary=summary or f"{path} of any healthy worker",
        answers={200: answer, **{status: _ROUTED_FAILURES[status] for status in (401, 502, 503, 504)}},
        otherwise=_ENGINES_OWN,
    )


def _own(
    path: str, summary: str, answers: Mapping[int, Answer], *parameters: Parameter, is_public: bool = False
) -> Operation:
    return Operation(
        method="GET",
        path=path,
        tag="the gateway itself",
        summary=summary,
        parameters=parameters,
        answers=answers if is_public else {401: _FAILURES[401], **answers},
        is_public=is_public,
    )


_UP: Mapping[int, Answer] = MappingProxyType({200: Answer("It does.", {TEXT: {"type": "string"}})})
_AUDIO: JsonObject = {
    "type": "object",
    "properties": {"model": _READ["model"], "file": {"type": "string", "format": "binary"}},
    "required": ["file"],
}

DATA_OPERATIONS = (
    *(_json(path, prompt) for path, prompt in _PROMPTS.items()),
    _routed("/v1/audio/transcriptions", _AUDIO, "multipart/form-data"),
    *map(_info, ("/get_model_info", "/get_server_info", "/version")),
    _info("/health_generate", "A test generation by any healthy worker, or by a prefill and a decode worker"),
    _own("/health", "Whether a shard lives", _UP, is_public=True),
    _own("/liveness", "Whether a shard lives", _UP, is_public=True),
    _own(
        "/readiness",
        "Whether requests can be answered",
        {
            200: Answer("At least one worker is healthy.", {JSON: Readiness}),
            503: Answer("No worker is, or the daemon is stopping.", {JSON: Readiness}),
        },
        is_public=True,
    ),
    _own("/v1/models", "The models that workers serve", {200: Answer("Of all workers.", {JSON: ModelCards})}),
    _own(
        "/v1/models/{id}",
        "One model",
        {200: Answer("It is served.", {JSON: ModelCard}), 404: _FAILURES[404]},
        Parameter("id", "path", "Its name; slashes need no encoding."),
    ),
    *BATCH_OPERATIONS,
)


def data_document() -> JsonObject:
    shared = {f"Error{status}": _FAILURES[status] for status in (401, 404)}
    shared |= {f"Failure{status}": answer for status, answer in _ROUTED_FAILURES.items()}
    return document(ABOUT, DATA_OPERATIONS, shared)
