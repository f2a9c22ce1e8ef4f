"""What the ledger knows of files, batches and lines."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgspec

from pointsman.daemon.batches.lifecycle import Status


class FileRow(msgspec.Struct, frozen=True):
    serial: int
    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    chunks: int
    created_at: int
    expires_at: int | None


class BatchRow(msgspec.Struct, frozen=True):
    serial: int
    id: str
    owner: str
    status: Status
    is_expired: bool
    input_file: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    errors: list[dict[str, Any]] | None
    output_ttl_s: int | None
    output_file: str | None
    error_file: str | None
    total: int
    completed: int
    failed: int
    lost: int
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None


class LineState(IntEnum):
    PENDING = 0
    SUCCEEDED = 1
    FAILED = 2


class LineRow(msgspec.Struct, frozen=True):
    number: int
    custom_id: str
    place: int
    size: int
    grouped: bytes
    state: LineState
    losses: int


class NewLine(msgspec.Struct, frozen=True):
    number: int
    custom_id: str
    place: int
    size: int
    grouped: bytes


class NewBatch(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    owner: str
    input_file: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: dict[str, str] | None
    output_ttl_s: int | None


class DoneLine(msgspec.Struct, frozen=True):
    """A line whose result is in the store."""

    batch: int
    """serial"""
    number: int
    has_succeeded: bool


class Page(msgspec.Struct, frozen=True):
    """Of a list: what the client asked for."""

    limit: int
    after: str | None = None
    is_ascending: bool = False
