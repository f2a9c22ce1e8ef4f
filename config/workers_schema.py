"""The shapes of workers.json: our own, and Prometheus' file_sd groups.

    {"workers": [{"url": "http://10.0.0.5:8000", "weight": 2, "models": ["qwen"]}]}
    [{"targets": ["10.0.0.5:8000"], "labels": {"__scheme__": "http", "weight": "2", "models": "qwen,llama"}}]

In a file_sd group these labels mean something to us: `__scheme__`, `model` or `models` (comma separated), `weight`,
`worker_type`, `bootstrap_port`, `kv_connector` and those of `Capacity`. Other labels that begin with `__` are dropped,
as Prometheus does; the rest become the worker's labels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from pointsman.config.pd import KvConnector
from pointsman.config.snapshot import MAX_TOKENS

WorkerType = Literal["regular", "prefill", "decode"]
MAX_WEIGHT = 1_000_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class WorkersSection(_Section):
    schema_: str | None = Field(default=None, alias="$schema")
    description: str | None = None
    workers: list[Any] = Field(max_length=10_000)


def _tokens(**more: Any) -> Any:
    return Field(default=None, ge=0, le=MAX_TOKENS, **more)


class Capacity(_Section):
    """Which prompts a worker takes (tokens, both ends included; in AIBrix's spelling, too), and what it holds."""

    prompt_tokens_min: int | None = _tokens()
    bucket_min: int | None = _tokens(alias="promptLenBucketMinLength")
    prompt_tokens_max: int | None = _tokens()
    """0 = no bound"""
    bucket_max: int | None = _tokens(alias="promptLenBucketMaxLength")
    kv_tokens: int | None = Field(default=None, ge=1, le=2**50)

    @field_validator("prompt_tokens_max", "bucket_max")
    @classmethod
    def _not_below_the_least(cls, value: int | None, info: ValidationInfo) -> int | None:
        low = info.data.get("prompt_tokens_min") or info.data.get("bucket_min") or 0
        if value and value < low:
            raise ValueError(f"is below the shortest prompt ({low} tokens)")
        return value

    @property
    def shortest(self) -> int:
        return self.prompt_tokens_min or self.bucket_min or 0

    @property
    def longest(self) -> int:
        return self.prompt_tokens_max or self.bucket_max or MAX_TOKENS


class WorkerSection(Capacity):
    url: str
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = Field(default=None, ge=1, le=65535)
    kv_connector: KvConnector | None = None
    models: list[str] = Field(default_factory=list, max_length=1000)
    weight: float = Field(default=1.0, gt=0, le=MAX_WEIGHT)
    labels: dict[str, str] = Field(default_factory=dict, max_length=64)
    api_key: str | None = Field(default=None, min_length=1)
    description: str | None = None


def _as_text(value: object) -> object:
    """YAML reads `weight: 2` as a number; Prometheus takes it for the text of a label all the same."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class TargetGroup(_Section):
    targets: list[str]
    labels: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(default_factory=dict, max_length=64)


class TargetLabels(Capacity):
    """The labels of a file_sd group that mean something to us, all text there."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, allow_inf_nan=False)

    scheme: Literal["http", "https"] = Field("http", alias="__scheme__")
    model: str | None = None
    models: str | None = None
    weight: float = Field(default=1.0, gt=0, le=MAX_WEIGHT)
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = Field(default=None, ge=1, le=65535)
    kv_connector: KvConnector | None = None
