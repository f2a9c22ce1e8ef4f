"""The shape of profiles.json: AIBrix's profile schema (both nestings of the bucket fields), plus `match`.

The names are AIBrix's own, so that a profile annotation can be pasted as it is. `INERT` keys are checked, and reported
as without effect in this version.
"""

from __future__ import annotations

from typing import Any

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        alias_generator=AliasGenerator(validation_alias=to_camel, alias=to_camel),
    )


_Tokens = Field(default=None, ge=0, le=2**31 - 1)


class Buckets(_Section):
    prompt_len_bucket_min_length: int | None = _Tokens
    prompt_len_bucket_max_length: int | None = _Tokens
    combined: bool | None = None


class RoutingConfig(Buckets):
    prefill_score_policy: str | None = None
    decode_score_policy: str | None = None
    prompt_tokens_gte: int | None = _Tokens
    prompt_tokens_lt: int | None = _Tokens
    max_tokens_gte: int | None = _Tokens
    max_tokens_lt: int | None = _Tokens


class ProfileSection(Buckets):
    description: str | None = None
    routing_strategy: str | None = None
    requests_per_second: float | None = Field(default=None, ge=0)
    requests_per_second_per_replica: float | None = Field(default=None, ge=0)
    requests_inflight: int | None = Field(default=None, ge=0)
    routing_config: RoutingConfig | None = None


class MatchSection(_Section):
    description: str | None = None
    profile: str
    model: str | None = Field(default=None, min_length=1)
    path: str | None = Field(default=None, min_length=1)
    key: str | None = Field(default=None, min_length=1)
    header: dict[str, str] = Field(default_factory=dict)


class ProfilesSection(_Section):
    schema_: str | None = Field(default=None, alias="$schema")
    description: str | None = None
    locked_routing_strategy: str | None = None
    default_profile: str = ""
    profiles: dict[str, Any]
    """of ProfileSection, checked one by one so that one defect does not hide the next"""
    match: list[Any] = Field(default_factory=list, max_length=1000)


ACTIVE = frozenset({"description", "routing_strategy", "routing_config"})
"""Keys of a profile that act in this version, or that only hold others."""
