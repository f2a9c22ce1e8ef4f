"""The shapes of workers.json: our own, and Prometheus' file_sd groups.

    {"workers": [{"url": "http://10.0.0.5:8000", "weight": 2, "models": ["qwen"]}]}
    [{"targets": ["10.0.0.5:8000"], "labels": {"__scheme__": "http", "weight": "2", "models": "qwen,llama"}}]

In a file_sd group these labels mean something to us: `__scheme__`, `model` or `models` (comma separated), `weight`,
`worker_type`, `bootstrap_port`. Other labels that begin with `__` are dropped, as Prometheus does; the rest become the
worker's labels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

WorkerType = Literal["regular", "prefill", "decode"]
MAX_WEIGHT = 1_000_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class WorkersSection(_Section):
    schema_: str | None = Field(default=None, alias="$schema")
    description: str | None = None
    workers: list[Any] = Field(max_length=10_000)


class WorkerSection(_Section):
    url: str
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = Field(default=None, ge=1, le=65535)
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


class TargetLabels(_Section):
    """The labels of a file_sd group that mean something to us, all text there."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, allow_inf_nan=False)

    scheme: Literal["http", "https"] = Field("http", alias="__scheme__")
    model: str | None = None
    models: str | None = None
    weight: float = Field(default=1.0, gt=0, le=MAX_WEIGHT)
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = Field(default=None, ge=1, le=65535)
