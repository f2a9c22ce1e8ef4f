"""Every operation of the admin API. Whoever adds a route adds it here: a test compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pointsman.admin_api.handlers.config import MAX_GENERATION
from pointsman.admin_api.handlers.explain import MAX_LIMIT
from pointsman.admin_api.handlers.fanout import MAX_TIMEOUT_S, OPERATIONS
from pointsman.admin_api.handlers.record import LINES_TYPE
from pointsman.admin_api.openapi import shapes
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
from pointsman.admin_api.ports import (
    ConfigDiffView,
    ConfigView,
    GenerationView,
    HistoryView,
    LogView,
    PauseView,
    SavedStateView,
    StatusView,
    UpgradeView,
)
from pointsman.admin_api.schemas import (
    MAX_DRAIN_S,
    ApplyBody,
    DrainBody,
    ExplainBody,
    LogBody,
    PatchBody,
    PauseBody,
    RecordBody,
    RollbackBody,
    UpgradeBody,
    WorkerBody,
)

ABOUT = Description(
    title="pointsman, admin API",
    text="State and control of a pointsman gateway. Bodies are JSON; a misspelt field or parameter is refused.",
    server="/",
    server_text="the listener that served this document",
    security={"token": {"type": "http", "scheme": "bearer", "description": "A token of admin_token_file."}},
)

ERRORS: Mapping[int, str] = MappingProxyType(
    {
        400: "BAD_REQUEST: the message names the field or parameter, and what was expected.",
        401: "UNAUTHORIZED: no token, or a wrong one.",
        403: "CROSS_SITE, CROSS_ORIGIN: sent by another site's page. SCOPE: not with that token.",
        408: "REQUEST_TIMEOUT: the body did not arrive in time.",
        413: "PAYLOAD_TOO_LARGE: the body exceeds 1 MiB (64 MiB of /update_weights_from_tensor).",
        415: "UNSUPPORTED_MEDIA_TYPE: bodies are JSON and say so.",
        421: "HOST_NOT_ALLOWED: by a name that is not the listener's.",
        429: "TOO_MANY_FAILURES: wrong tokens from that address; Retry-After says how long to wait.",
        500: "INTERNAL: a defect; the daemon's log has it.",
        503: "UPGRADING, DRAINING, NOT_PUBLISHED: not now; ask again.",
    }
)
_ALWAYS = (400, 401, 403, 421, 429, 500)
_CHANGING = (*_ALWAYS, 408, 413, 415, 503)

_WORKER = Parameter("key", "path", "The worker's id, or its URL, percent-encoded.")
_MODEL = Parameter("model", "query", "Only workers that serve it.")
_RETRY = {"Retry-After": "seconds"}


def _error(status: int, text: str = "") -> Answer:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: _RETRY, 503: {}}.get(status, {})
    return Answer(text or ERRORS[status], {JSON: shapes.Error}, headers)


_USUAL = {status: _error(status) for status in ERRORS}


def _json(shape: Shape, description: str, **headers: str) -> Answer:
    return Answer(description, {JSON: shape}, {name.replace("_", "-"): text for name, text in headers.items()})


def _text(description: str) -> Answer:
    return Answer(description, {TEXT: {"type": "string"}})


def _operation(
    method: str,
    path: str,
    tag: str,
    summary: str,
    answers: Mapping[int, Answer],
    *,
    description: str = "",
    parameters: tuple[Parameter, ...] = (),
    body: Body | None = None,
    is_public: bool = False,
) -> Operation:
    """With the errors that every such operation has."""
    usual = _ALWAYS if method == "GET" else _CHANGING
    return Operation(
        method=method,
        path=path,
        tag=tag,
        summary=summary,
        description=description,
        parameters=parameters,
        body=body,
        answers={**{status: _USUAL[status] for status in usual}, **answers},
        is_public=is_public,
    )


_NO_WORKER = _error(404, "WORKER_NOT_FOUND")
_OF_A_FILE = _error(409, "WORKER_DECLARED_IN_FILE: the message names the file. WORKER_DRAINING: it was removed.")
_ACCEPTED = _json(shapes.Accepted, "It is in force in all shards.", Location="/workers/ID")

_STATE = (
    _operation("GET", "/", "state", "This API on one page", {200: _text("For people.")}),
    _operation("GET", "/health", "state", "Whether control lives", {200: _text("It does.")}, is_public=True),
    _operation("GET", "/status", "state", "What runs, and how", {200: _json(StatusView, "The daemon as it is now.")}),
    _operation("GET", "/metrics", "state", "For Prometheus", {200: _text("Text exposition format 0.0.4.")}),
    _operation(
        "GET",
        "/docs",
        "state",
        "The APIs as a page for people",
        {200: Answer("HTML.", {"text/html": {"type": "string"}})},
        is_public=True,
    ),
    _operation(
        "GET",
        "/openapi.json",
        "state",
        "This document",
        {200: _json({"type": "object"}, "OpenAPI 3.1.")},
        is_public=True,
    ),
    _operation(
        "GET",
        "/openapi-data.json",
        "state",
        "The same of the port that clients connect to",
        {200: _json({"type": "object"}, "OpenAPI 3.1.")},
        is_public=True,
    ),
    _operation(
        "POST",
        "/state/snapshot",
        "state",
        "Write what routing has learned to the state directory, now",
        {
            200: _json(SavedStateView, "It is on the disk."),
            500: _error(500, "STATE_NOT_SAVED: the state directory cannot be written."),
        },
    ),
    _operation(
        "POST",
        "/upgrade",
        "state",
        "Have the installed version take over",
        {
            200: _json(UpgradeView, "It has; this daemon finishes what runs."),
            409: _error(409, "UPGRADE_REFUSED: not now."),
            500: _error(500, "UPGRADE_FAILED: tried, and given up; this daemon goes on."),
        },
        description="Answered by the old daemon, when it is over. No connection is refused or reset.",
        body=Body(UpgradeBody, required=False),
    ),
)

_PAUSE = (
    _operation(
        "POST",
        "/pause",
        "state",
        "Let no request start at an engine",
        {
            200: _json(PauseView, "From now on none does, in any shard."),
            409: _error(409, "UPGRADE_RUNS: another daemon is taking over."),
            504: _error(504, "PAUSE_NOT_ACKNOWLEDGED: paused, but a shard is silent."),
        },
        description="Requests wait (hold), or are answered 503 (reject); docs/pause.md.",
        body=Body(PauseBody, required=False, example={"mode": "hold", "reason": "new weights"}),
    ),
    _operation(
        "POST",
        "/resume",
        "state",
        "Let them start again",
        {200: _json(PauseView, "Held ones go on, in order."), 409: _error(409, "NOT_PAUSED")},
    ),
)

_WORKERS = (
    _operation(
        "GET",
        "/workers",
        "workers",
        "The workers",
        {200: _json(shapes.Workers, "In declaration order.")},
        parameters=(
            _MODEL,
            Parameter(
                "state",
                "query",
                "draining: the removed ones whose requests still run; all: these, too.",
                {"type": "string", "enum": ["draining", "all"]},
            ),
        ),
    ),
    _operation(
        "POST",
        "/workers",
        "workers",
        "Add a worker",
        {
            202: _ACCEPTED,
            409: _error(409, "WORKER_ALREADY_EXISTS; WORKER_DRAINING: its requests still run."),
            500: _error(500, "STATE_NOT_SAVED: it holds until the restart."),
            503: _error(503, "WORKER_LIMIT: max_workers. UPGRADING, DRAINING, NOT_PUBLISHED: not now; ask again."),
        },
        description="Picked from its first good probe on. URLs must lie in worker_networks, and not be our own.",
        body=Body(WorkerBody, example={"url": "http://10.0.0.5:8000", "models": ["qwen"], "weight": 2}),
    ),
    _operation(
        "GET",
        "/workers/{key}",
        "workers",
        "One worker",
        {200: _json(shapes.Worker, "As it is now."), 404: _NO_WORKER},
        parameters=(_WORKER,),
    ),
    _operation(
        "PATCH",
        "/workers/{key}",
        "workers",
        "Change some of a worker",
        {202: _ACCEPTED, 404: _NO_WORKER, 409: _OF_A_FILE},
        description="Only what is there changes.",
        parameters=(_WORKER,),
        body=Body(PatchBody, example={"weight": 0.5}),
    ),
    _operation(
        "PUT",
        "/workers/{key}",
        "workers",
        "Change all of a worker but its URL",
        {202: _ACCEPTED, 404: _NO_WORKER, 409: _OF_A_FILE},
        description="What the body does not name goes back to its default.",
        parameters=(_WORKER,),
        body=Body(WorkerBody, example={"url": "http://10.0.0.5:8000"}),
    ),
    _operation(
        "DELETE",
        "/workers/{key}",
        "workers",
        "Remove a worker",
        {202: _json(shapes.Accepted, "No shard picks it any more."), 404: _NO_WORKER, 409: _OF_A_FILE},
        description="Its running requests end, in their own time unless a parameter says otherwise.",
        parameters=(
            _WORKER,
            Parameter(
                "deadline_s",
                "query",
                "What still runs then is ended.",
                {"type": "number", "minimum": 0, "maximum": MAX_DRAIN_S},
            ),
            Parameter(
                "force", "query", "End what runs at once.", {"type": "string", "enum": ["0", "1", "false", "true"]}
            ),
        ),
    ),
    _operation(
        "POST",
        "/workers/{key}/drain",
        "workers",
        "Give a worker no new requests, until it is undrained",
        {
            202: _json(shapes.Accepted, "No shard picks it any more."),
            404: _NO_WORKER,
            409: _error(409, "WORKER_DRAINING: it was removed."),
            500: _error(500, "STATE_NOT_SAVED: it is not drained."),
        },
        description="What still runs at the deadline is ended (close) or left alone (keep).",
        parameters=(_WORKER,),
        body=Body(DrainBody, required=False, example={"deadline_s": 300}),
    ),
    _operation(
        "POST",
        "/workers/{key}/undrain",
        "workers",
        "Give it requests again",
        {
            200: _json(shapes.Accepted, "When it is healthy."),
            404: _NO_WORKER,
            409: _error(409, "WORKER_DRAINING: it was removed."),
        },
        parameters=(_WORKER,),
    ),
    _operation(
        "POST",
        "/workers/{key}/forget",
        "workers",
        "Believe nothing to be in its engine's prefix cache",
        {200: _json(shapes.Accepted, "Nothing is believed to be cached there."), 404: _NO_WORKER},
        parameters=(_WORKER,),
    ),
)

_ROUTING = (
    _operation(
        "POST",
        "/explain",
        "routing",
        "Where a request would go, and why",
        {
            200: _json(shapes.Explained, "Nothing was sent or booked."),
            404: _error(404, "model_not_found, PROFILE_NOT_FOUND"),
            400: _error(400, "BAD_REQUEST, BAD_PROFILE: the message says what, and what was expected."),
        },
        description="The body is a request as a client would send it, or one with its path, headers and profile.",
        body=Body((ExplainBody, {"type": "object", "not": {"required": ["request"]}})),
    ),
    _operation(
        "GET",
        "/decisions",
        "routing",
        "The newest routed requests",
        {200: _json(shapes.Decisions, "Newest first."), 404: _NO_WORKER},
        parameters=(
            Parameter(
                "limit", "query", "How many.", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 50}
            ),
            Parameter("worker", "query", "Only of this one, by id or URL."),
        ),
    ),
    _operation(
        "GET",
        "/decisions/{id}",
        "routing",
        "One routed request",
        {
            200: _json({"type": "object"}, "With its explanation where it was kept."),
            404: _error(404, "DECISION_NOT_FOUND"),
        },
        parameters=(Parameter("id", "path", "As in x-request-id."),),
    ),
    _operation(
        "GET",
        "/workers/{key}/why",
        "routing",
        "What went to a worker lately, and why",
        {200: _json({"type": "object"}, "Counts, loads and advice."), 404: _NO_WORKER},
        parameters=(
            _WORKER,
            Parameter(
                "last",
                "query",
                "How far back, at most 7 days.",
                {"type": "string", "pattern": r"^[1-9][0-9]{0,2}(\.[0-9]{1,3})?(s|m|h)$", "default": "10m"},
            ),
        ),
    ),
    _operation(
        "POST",
        "/record",
        "routing",
        "The traffic as a trace, for as long as it is read",
        {
            200: Answer("Lines of JSON; the last one is the summary.", {LINES_TYPE: {"type": "string"}}),
            409: _error(409, "RECORDING_RUNS: somebody records already."),
        },
        description="Lengths, times and hashes; no text.",
        body=Body(RecordBody, example={"minutes": 10}),
    ),
    _operation(
        "DELETE",
        "/record",
        "routing",
        "End the recording that runs",
        {202: _json(shapes.Stopped, "Whoever records gets the rest."), 404: _error(404, "NO_RECORDING")},
    ),
)

_GENERATION: JsonObject = {"type": "integer", "minimum": 1, "maximum": MAX_GENERATION}
_NOT_KEPT = _error(404, "GENERATION_NOT_KEPT: the message says which are.")
_OTHER_VERSION = _error(409, "WRITTEN_BY_ANOTHER_VERSION")
_REFUSED = _error(422, "CONFIG_REFUSED: the message says where and why, one line for each defect.")
_HOLD_NOT_SAVED = _error(500, "STATE_NOT_SAVED: the state directory cannot be written; nothing has changed.")

_CONFIG = (
    _operation(
        "GET", "/config", "configuration", "The configuration in force", {200: _json(ConfigView, "And its files.")}
    ),
    _operation(
        "GET",
        "/config/history",
        "configuration",
        "What the files said in the last generations",
        {200: _json(HistoryView, "The newest first.")},
    ),
    _operation(
        "GET",
        "/config/history/{generation}",
        "configuration",
        "One of them, with its content",
        {200: _json(GenerationView, "Secrets are hashes."), 404: _NOT_KEPT, 409: _OTHER_VERSION},
        parameters=(Parameter("generation", "path", "Its number.", _GENERATION),),
    ),
    _operation(
        "GET",
        "/config/diff",
        "configuration",
        "What changed from one generation to another",
        {200: _json(ConfigDiffView, "Secrets are hashes."), 404: _NOT_KEPT, 409: _OTHER_VERSION},
        parameters=(
            Parameter("from", "query", "The earlier one.", _GENERATION, required=True),
            Parameter("to", "query", "The later one; without: what is in force.", _GENERATION),
        ),
    ),
    _operation(
        "POST",
        "/config/rollback",
        "configuration",
        "Go back to an old generation's profiles and workers",
        {
            200: _json(ConfigView, "They are in force, until the files change: `held`."),
            404: _NOT_KEPT,
            409: _error(409, "SECRET_NOT_KEPT: the message says whose. WRITTEN_BY_ANOTHER_VERSION."),
            422: _REFUSED,
            500: _HOLD_NOT_SAVED,
        },
        description="Published as a new generation; docs/config-history.md.",
        body=Body(RollbackBody, example={"generation": 12}),
    ),
    _operation(
        "POST",
        "/config/apply",
        "configuration",
        "Put a file in force in the place of the configured one",
        {
            200: _json(ConfigView, "It is in force, until the configured file changes: `held`."),
            409: _error(409, "CONFIRMATION_PENDING: something else is on trial."),
            422: _REFUSED,
            500: _HOLD_NOT_SAVED,
        },
        description="With confirm_within_s it is taken back by then, unless it is confirmed.",
        body=Body(
            ApplyBody,
            example={
                "kind": "profiles",
                "name": "profiles.json",
                "content": '{"profiles": {"default": {}}}',
                "confirm_within_s": 120,
            },
        ),
    ),
    _operation(
        "POST",
        "/config/confirm",
        "configuration",
        "Keep what is on trial",
        {
            200: _json(ConfigView, "It stays."),
            409: _error(409, "NOTHING_TO_CONFIRM"),
            422: _REFUSED,
            500: _HOLD_NOT_SAVED,
        },
    ),
    _operation(
        "POST",
        "/config/release",
        "configuration",
        "The files again, whatever is held in their place",
        {
            200: _json(ConfigView, "They are in force."),
            409: _error(409, "NOTHING_HELD"),
            422: _REFUSED,
            500: _HOLD_NOT_SAVED,
        },
    ),
    _operation(
        "GET", "/log-level", "state", "What is logged", {200: _json(LogView, "Level, and share of the access lines.")}
    ),
    _operation(
        "PUT",
        "/log-level",
        "state",
        "Change what is logged",
        {200: _json(LogView, "In force in all processes, until the daemon restarts.")},
        description="What the body does not name stays. Requests with an error always have their access line.",
        body=Body(LogBody, example={"level": "debug", "access_sample": 0.1}),
    ),
    _operation(
        "POST",
        "/config/reload",
        "configuration",
        "Read the files again",
        {200: _json(ConfigView, "They are in force."), 422: _json(ConfigView, "Refused: `errors` says why.")},
    ),
)

_TARGETS = (
    Parameter(
        "worker",
        "query",
        "Only this one, by id or URL; may be repeated.",
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 255},
    ),
    _MODEL,
    Parameter(
        "timeout_s",
        "query",
        "For all attempts together.",
        {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S},
    ),
    Parameter(
        "include_down",
        "query",
        "Ask those too whose probes fail.",
        {"type": "string", "enum": ["0", "1", "false", "true"]},
    ),
)
_WHAT: Mapping[str, str] = MappingProxyType(
    {
        "flush_cache": "Empty the prefix caches",
        "abort_request": "End one request (rid), or all",
        "pause_generation": "Pause the engines",
        "continue_generation": "Let paused engines go on",
        "update_weights_from_disk": "Load weights from a path",
        "update_weights_from_distributed": "Take weights from a trainer's process group",
        "update_weights_from_tensor": "Take weights from the body",
        "release_memory_occupation": "Release the engines' memory",
        "resume_memory_occupation": "Take that memory again",
        "start_profile": "Start the engines' profilers",
        "stop_profile": "Stop them",
    }
)
_NOBODY = _error(404, "WORKER_NOT_FOUND, MODEL_NOT_FOUND: nobody was asked.")


def _fanout_answers(shape: Shape) -> dict[int, Answer]:
    return {
        200: _json(shape, "All did it."),
        206: _json(shape, "Some did it."),
        404: _NOBODY,
        502: _json(shape, "Nobody did it."),
    }


def _fanout(name: str) -> Operation:
    return _operation(
        "POST",
        f"/{name}",
        "engines",
        _WHAT[name],
        _fanout_answers(shapes.FlushAnswer if name == "flush_cache" else shapes.FanoutAnswer),
        description="At all engines, or those that the parameters name; in SGLang's words, then in vLLM's.",
        parameters=_TARGETS,
        body=Body({"type": "object"}, required=False),
    )


_ENGINES = (
    *map(_fanout, OPERATIONS),
    _operation(
        "GET",
        "/get_loads",
        "engines",
        "The engines' own words about their load",
        _fanout_answers(shapes.LoadsAnswer),
        parameters=_TARGETS,
    ),
    _operation(
        "GET",
        "/engine_metrics",
        "engines",
        "All engines' metrics, labelled by worker",
        {
            200: _text("Text exposition format 0.0.4."),
            404: _NOBODY,
            502: _json(shapes.FanoutAnswer, "Nobody told any."),
        },
        parameters=_TARGETS,
    ),
)


def _legacy_answers(**more: str) -> dict[int, Answer]:
    plain: dict[int, Answer] = {
        200: _text("Done."),
        400: Answer("What was wrong.", {TEXT: {"type": "string"}, JSON: shapes.Error}),
    }
    return plain | {
        int(status.lstrip("_")): Answer(text, {TEXT: {"type": "string"}, JSON: shapes.Error})
        for status, text in more.items()
    }


_URL = Parameter("url", "query", "The worker's.", {"type": "string", "minLength": 1}, required=True)
_LEGACY = (
    _operation(
        "POST",
        "/add_worker",
        "sglang-router, first generation",
        "Add a worker",
        _legacy_answers(_500="STATE_NOT_SAVED", _503="WORKER_LIMIT, UPGRADING, NOT_PUBLISHED"),
        parameters=(
            _URL,
            Parameter("api_key", "query", "Sent to the worker."),
            Parameter(
                "worker_type", "query", "Its role.", {"type": "string", "enum": ["regular", "prefill", "decode"]}
            ),
            Parameter(
                "bootstrap_port", "query", "Of a prefill worker.", {"type": "integer", "minimum": 1, "maximum": 65535}
            ),
            Parameter("model_id", "query", "The model it serves."),
        ),
    ),
    _operation(
        "POST",
        "/remove_worker",
        "sglang-router, first generation",
        "Remove a worker",
        _legacy_answers(_409="WORKER_DECLARED_IN_FILE, WORKER_DRAINING", _503="UPGRADING, NOT_PUBLISHED"),
        parameters=(_URL,),
    ),
    _operation(
        "GET",
        "/list_workers",
        "sglang-router, first generation",
        "The workers' URLs",
        {200: _json(shapes.WorkerUrls, "In declaration order.")},
    ),
)

ADMIN_OPERATIONS = (*_STATE, *_PAUSE, *_WORKERS, *_ROUTING, *_CONFIG, *_ENGINES, *_LEGACY)


def admin_document() -> JsonObject:
    return document(ABOUT, ADMIN_OPERATIONS, {f"Error{status}": answer for status, answer in _USUAL.items()})
