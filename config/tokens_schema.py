"""The shape of a file of named admin tokens (`admin_token_file` with the ending .json, .yaml or .toml).

    {"tokens": {"grafana": {"sha256": "9f86…", "scope": "read"}}}

Tokens stand there by their hash alone (`pointsman tokens new NAME` makes both).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pointsman.config.keys_schema import DIGEST_PATTERN

MAX_TOKENS = 1000
TokenScope = Literal["read", "operate", "admin"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TokensSection(_Section):
    schema_: str | None = Field(default=None, alias="$schema")
    description: str | None = None
    tokens: dict[str, Any] = Field(max_length=MAX_TOKENS)
    """of TokenSection, checked one by one so that one defect does not hide the next"""


class TokenSection(_Section):
    description: str | None = None
    sha256: str = Field(json_schema_extra={"pattern": DIGEST_PATTERN})
    scope: TokenScope
