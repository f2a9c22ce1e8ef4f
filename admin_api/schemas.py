"""Bodies that the admin API takes, strictly: an unknown or mistyped field is an error that names the nearest one.

SGLang's gateways know more fields than we do. Those that can be left aside without harm are taken, and named in the
answer's `warnings`; those whose absence would make the worker behave otherwise than asked are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from pointsman.admin_api.answers import bad_request
from pointsman.admin_api.ports import (
    DEFAULT_UPGRADE_TIMEOUT_S,
    MAX_UPGRADE_TIMEOUT_S,
    ApplyRequest,
    ExplainRequest,
    WorkerPatch,
    WorkerRequest,
)
from pointsman.config import defects
from pointsman.config.pd import KvConnector
from pointsman.config.workers_schema import MAX_WEIGHT, Capacity, WorkerType

LEFT_ASIDE = (
    "priority",
    "cost",
    "runtime_type",
    "runtime",
    "provider",
    "health",
    "http_pool",
    "resilience",
    "overload",
    "max_connection_attempts",
    "load_monitor_interval_secs",
    "kv_role",
    "kv_engine_id",
    "kv_block_size",
    "tokenizer_path",
    "reasoning_parser",
    "tool_parser",
    "chat_template",
)
"""Known to SGLang's gateways (generations 2 and 3), without effect here."""

MAX_RECORD_MINUTES = 24 * 60
MAX_DRAIN_S = 7 * 86_400
MAX_CONFIRM_S = 86_400

Body = TypeVar("Body", bound=BaseModel)


def _card_id(value: object) -> object:
    """A model may be given as its name or as a card: an object with `id`."""
    return value.get("id") if isinstance(value, dict) else value


ModelName = Annotated[str, Field(min_length=1, max_length=512), BeforeValidator(_card_id)]
Models = Annotated[list[ModelName], Field(max_length=1000)]
Weight = Annotated[float, Field(gt=0, le=MAX_WEIGHT)]
Labels = Annotated[dict[str, str], Field(max_length=64)]
ApiKey = Annotated[str | None, Field(min_length=1, max_length=8192)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class WorkerBody(Capacity):
    """POST /workers, PUT /workers/ID"""

    url: str
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = Field(default=None, ge=1, le=65535)
    kv_connector: KvConnector | None = None
    models: Models = Field(default_factory=list)
    model_id: str | None = None
    """generation 2's one model"""
    weight: Weight = 1.0
    labels: Labels = Field(default_factory=dict)
    api_key: ApiKey = None
    connection_mode: Literal["http"] | None = None
    dp_size: Literal[1] | None = None
    """more ranks behind one URL would have to be workers of their own"""

    # left aside
    priority: Any = None
    cost: Any = None
    runtime_type: Any = None
    runtime: Any = None
    provider: Any = None
    health: Any = None
    http_pool: Any = None
    resilience: Any = None
    overload: Any = None
    max_connection_attempts: Any = None
    load_monitor_interval_secs: Any = None
    kv_role: Any = None
    kv_engine_id: Any = None
    kv_block_size: Any = None
    tokenizer_path: Any = None
    reasoning_parser: Any = None
    tool_parser: Any = None
    chat_template: Any = None

    @field_validator("connection_mode", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    def to_request(self) -> WorkerRequest:
        return WorkerRequest(
            url=self.url,
            worker_type=self.worker_type,
            bootstrap_port=self.bootstrap_port,
            kv_connector=self.kv_connector,
            models=tuple(self.models) or ((self.model_id,) if self.model_id else ()),
            weight=self.weight,
            labels=self.labels,
            api_key=self.api_key,
            prompt_tokens_min=self.shortest,
            prompt_tokens_max=self.longest,
            kv_tokens=self.kv_tokens,
        )

    def to_patch(self) -> WorkerPatch:
        """Everything that may change of a worker, for PUT: what the body does not name goes back to its default."""
        request = self.to_request()
        return WorkerPatch(
            weight=request.weight,
            labels=request.labels,
            models=request.models,
            api_key=request.api_key,
            prompt_tokens_min=request.prompt_tokens_min,
            prompt_tokens_max=request.prompt_tokens_max,
            kv_tokens=request.kv_tokens,
        )

    def warnings(self) -> list[str]:
        given = [name for name in LEFT_ASIDE if name in self.model_fields_set and getattr(self, name) is not None]
        return [f"{name} has no effect here" for name in given]


class PatchBody(Capacity):
    """PATCH /workers/ID: only what is there changes."""

    models: Models = Field(default_factory=list)
    weight: Weight = 1.0
    labels: Labels = Field(default_factory=dict)
    api_key: ApiKey = None

    def to_patch(self) -> WorkerPatch:
        given = self.model_fields_set
        return WorkerPatch(
            models=tuple(self.models) if "models" in given else msgspec.UNSET,
            weight=self.weight if "weight" in given else msgspec.UNSET,
            labels=self.labels if "labels" in given else msgspec.UNSET,
            api_key=self.api_key if "api_key" in given else msgspec.UNSET,
            prompt_tokens_min=self.shortest if given & {"prompt_tokens_min", "bucket_min"} else msgspec.UNSET,
            prompt_tokens_max=self.longest if given & {"prompt_tokens_max", "bucket_max"} else msgspec.UNSET,
            kv_tokens=self.kv_tokens if "kv_tokens" in given else msgspec.UNSET,
        )


class DrainBody(_Strict):
    """POST /workers/ID/drain"""

    deadline_s: float | None = Field(default=None, ge=0, le=MAX_DRAIN_S)
    then: Literal["close", "keep"] = "close"

    @field_validator("then")
    @classmethod
    def _needs_deadline(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("deadline_s") is None and "deadline_s" in info.data:
            raise ValueError("is what happens at the deadline: give deadline_s, too")
        return value


class RecordBody(_Strict):
    """POST /record"""

    minutes: float = Field(gt=0, le=MAX_RECORD_MINUTES)


class RollbackBody(_Strict):
    """POST /config/rollback"""

    generation: int = Field(ge=1)


class ApplyBody(_Strict):
    """POST /config/apply"""

    kind: Literal["profiles", "workers"]
    name: str = Field(min_length=1, max_length=400)
    """Of the file: its ending says whether `content` is JSON, YAML or TOML."""
    content: str
    """The file."""
    confirm_within_s: float | None = Field(default=None, ge=1, le=MAX_CONFIRM_S)
    """Without a confirmation by then it is taken back."""

    def to_request(self) -> ApplyRequest:
        return ApplyRequest(
            kind=self.kind, name=self.name, content=self.content, confirm_within_s=self.confirm_within_s
        )


class LogBody(_Strict):
    """PUT /log-level: what is not there stays."""

    level: Literal["debug", "info", "warning", "error"] | None = None
    access_sample: float | None = Field(default=None, ge=0, le=1)
    """The share of the requests without an error that get an access line."""


class PauseBody(_Strict):
    """POST /pause"""

    mode: Literal["hold", "reject"] = "hold"
    reason: str = Field(default="", max_length=400)


class UpgradeBody(_Strict):
    """POST /upgrade"""

    timeout_s: float = Field(default=DEFAULT_UPGRADE_TIMEOUT_S, ge=1, le=MAX_UPGRADE_TIMEOUT_S)


class ExplainBody(_Strict):
    """POST /explain, with what the request is sent with"""

    request: dict[str, Any]
    path: str = Field(default="/v1/chat/completions", pattern="^/", max_length=4096)
    headers: dict[str, str] = Field(default_factory=dict, max_length=100)
    profile: str | dict[str, Any] | None = None


def read_explain(data: bytes) -> ExplainRequest:
    """That, or a plain request body. Raises RequestError 400 with all defects."""
    value = _parse(data)
    if isinstance(value, dict) and "request" not in value:
        return ExplainRequest(request=value)
    body = check(value, ExplainBody)
    return ExplainRequest(request=body.request, path=body.path, headers=body.headers, profile=body.profile)


def read_drain(data: bytes) -> DrainBody:
    """An empty body will do. Raises RequestError 400 with all defects."""
    return check(_parse(data), DrainBody) if data.strip() else DrainBody()


def read_body(data: bytes, model: type[Body]) -> Body:
    """Raises RequestError 400 with all defects."""
    return check(_parse(data), model)


def check(value: object, model: type[Body]) -> Body:
    found: list[str] = []

    def report(path: defects.Path, problem: str, hint: str) -> None:
        place = ".".join(map(str, path))
        found.append(f"{place}: {problem}{f' ({hint})' if hint else ''}" if place else problem)

    body = defects.check(model, value, report)
    if not isinstance(body, model):
        raise bad_request("; ".join(found))
    return body


def _parse(data: bytes) -> object:
    if not data.strip():
        raise bad_request("expected a JSON object, got an empty body")
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("expected a JSON object")
    return value
