"""What the admin API answers, where that is more than a view of the daemon's (`ports`): for its document alone.

Tests keep these and the answers in step.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pointsman.admin_api.ports import LoadView, TargetResult, WorkerView


class Error(msgspec.Struct, frozen=True, kw_only=True):
    error: str
    """for people"""
    code: str
    """for programs"""


class Worker(WorkerView, frozen=True, kw_only=True):
    """A worker as it is now, with what clients of SGLang's gateways look for."""

    model_id: str
    load: int
    connection_mode: Literal["http"]
    priority: int
    cost: float


class WorkerCounts(msgspec.Struct, frozen=True, kw_only=True):
    prefill_count: int
    decode_count: int
    regular_count: int


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    workers: list[Worker]
    total: int
    stats: WorkerCounts


class WorkerUrls(msgspec.Struct, frozen=True, kw_only=True):
    urls: list[str]


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a worker that is in force."""

    status: Literal["accepted"]
    success: bool
    worker_id: str
    url: str
    location: str
    message: str
    warnings: list[str]
    worker: Worker


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["accepted"]


class FailedTarget(msgspec.Struct, frozen=True, kw_only=True):
    worker: str
    error: str | None


class FanoutAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Who did it, who did not and why."""

    status: Literal["success", "partial_success", "failure"]
    message: str
    operation: str
    timeout_s: float
    succeeded: list[str]
    failed: list[FailedTarget]
    unsupported: list[str]
    results: list[TargetResult]


class FlushAnswer(FanoutAnswer, frozen=True, kw_only=True):
    """With what clients of SGLang's gateways look for."""

    successful: list[str]
    workers_flushed: int
    total_http_workers: int
    total_grpc_workers: int
    total_workers: int


class LoadsAnswer(FanoutAnswer, frozen=True, kw_only=True):
    workers: list[LoadView]


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request would go; docs/explain.md has all fields."""

    worker: str | None
    candidates: list[dict[str, Any]]


class Decisions(msgspec.Struct, frozen=True, kw_only=True):
    decisions: list[dict[str, Any]]
    """docs/explain.md has the fields"""
