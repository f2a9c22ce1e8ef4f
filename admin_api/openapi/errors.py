"""The data port's errors."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class GatewayError(msgspec.Struct, frozen=True, kw_only=True):
    """In OpenAI's shape; `error.code` is for programs."""

    error: Problem
