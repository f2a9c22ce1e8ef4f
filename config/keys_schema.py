"""The shape of keys.json: the API keys that clients of the data port must show.

    {"keys": {"team-a": {"sha256": "9f86…", "models": ["qwen*"], "requests_per_minute": 600}}}

A key stands there in clear (`key`) or, better, by its hash (`sha256`, from `pointsman keys hash`).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MAX_KEYS = 10_000
MIN_KEY_CHARS = 16
"""SHA-256 is quick to try: it hides what nobody can guess, and nothing else."""
MAX_KEY_CHARS = 512
NAME_PATTERN = "^[!-~]{1,128}$"
DIGEST_PATTERN = "^[0-9A-Fa-f]{64}$"
KEY_PATTERN = f"^[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class KeysSection(_Section):
    schema_: str | None = Field(default=None, alias="$schema")
    description: str | None = None
    keys: dict[str, Any] = Field(max_length=MAX_KEYS)
    """of KeySection, checked one by one so that one defect does not hide the next"""


class KeySection(_Section):
    description: str | None = None
    key: str | None = Field(default=None, json_schema_extra={"pattern": KEY_PATTERN})
    """In clear; or:"""
    sha256: str | None = Field(default=None, json_schema_extra={"pattern": DIGEST_PATTERN})
    user: str | None = Field(default=None, min_length=1, max_length=256)
    models: list[str] | None = Field(default=None, min_length=1, max_length=1000)
    profiles: list[str] | None = Field(default=None, min_length=1, max_length=1000)
    requests_per_minute: float = Field(default=0.0, ge=0, le=1e9)
    tokens_per_minute: float = Field(default=0.0, ge=0, le=1e9)
    routing_headers: bool | None = None
