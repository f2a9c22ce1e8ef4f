"""The shape of profiles.json: AIBrix's profile schema (both nestings of its fields), plus `match` and `shared`.

The names are AIBrix's own, so that a profile annotation can be pasted as it is. Keys that are not in `ACTIVE` are
checked, and reported as without effect in this version. Parameters of policies are `profile_parameters`' concern:
they are taken out before a profile is checked against this.
"""

from __future__ import annotations

from typing import Any, Literal

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


def _parameters(name: str) -> Any:
    """Named here for the sake of "did you mean"; never filled."""
    return Field(default=None, alias=name)


class Nested(_Section):
    """What may stand in a profile itself and under its `routingConfig`, which wins."""

    prompt_len_bucket_min_length: int | None = _Tokens
    prompt_len_bucket_max_length: int | None = _Tokens
    """0 = no bound"""
    combined: bool | None = None
    prompt_tokens_gte: int | None = _Tokens
    prompt_tokens_lt: int | None = _Tokens
    max_tokens_gte: int | None = _Tokens
    max_tokens_lt: int | None = _Tokens

    chain: Any = _parameters("chain")
    sticky: Any = _parameters("sticky")
    cache_aware: Any = _parameters("cache_aware")
    expected_cost: Any = _parameters("expected_cost")
    dynamo: Any = _parameters("dynamo")
    llm_d: Any = _parameters("llm_d")
    consistent_hash: Any = _parameters("consistent_hash")
    prefix_hash: Any = _parameters("prefix_hash")


class RoutingConfig(Nested):
    description: str | None = None
    prefill_score_policy: str | None = None
    decode_score_policy: str | None = None
    prompt_length_bucketing: bool | None = None
    bucket_serve: bool | None = None
    bucket_serve_mode: str | None = None
    load_balance: dict[str, Any] | None = None
    prefix_cache: dict[str, Any] | None = None
    preble: dict[str, Any] | None = None
    vtc: dict[str, Any] | None = None
    auto_blend: dict[str, Any] | None = None
    pd: dict[str, Any] | None = None


class ProfileSection(Nested):
    description: str | None = None
    routing_strategy: str | None = None
    requests_per_second: float | None = Field(default=None, ge=0)
    requests_per_second_per_replica: float | None = Field(default=None, ge=0)
    requests_inflight: int | None = Field(default=None, ge=0)
    routing_config: RoutingConfig | None = None
    retry: Any = None
    timeouts: Any = None
    limits: Any = None
    pd: Any = None
    """Of `resilience.RetrySection`, `TimeoutsSection`, `LimitsSection`, `pd.PdSection`"""
    stream_failure: Literal["error", "continue"] | None = None


class MatchSection(_Section):
    description: str | None = None
    profile: str
    model: str | None = Field(default=None, min_length=1)
    path: str | None = Field(default=None, min_length=1)
    key: str | None = Field(default=None, min_length=1)
    header: dict[str, str] = Field(default_factory=dict)


class SharedSection(BaseModel):
    """What is one for all profiles. Keys in snake case or camel case: they are respelled before this."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    description: str | None = None
    eviction_interval_secs: float | None = Field(default=None, ge=0, le=7 * 86400)
    max_tree_size: int | None = Field(default=None, ge=1024, le=2**50)
    admission: Any = None
    breaker: Any = None
    health: Any = None
    """Of `resilience.AdmissionSection`, `BreakerSection`, `HealthSection`"""


class ProfilesSection(_Section):
    schema_: str | None = Field(default=None, alias="$schema")
    description: str | None = None
    locked_routing_strategy: str | None = None
    default_profile: str = ""
    profiles: dict[str, Any]
    """of ProfileSection, checked one by one so that one defect does not hide the next"""
    match: list[Any] = Field(default_factory=list, max_length=1000)
    shared: Any = None
    """SharedSection"""


HINTS = ("prompt_tokens_gte", "prompt_tokens_lt", "max_tokens_gte", "max_tokens_lt")
ACTIVE = frozenset(
    {"description", "routing_strategy", "routing_config", *HINTS}
    | {"prompt_len_bucket_min_length", "prompt_len_bucket_max_length", "eviction_interval_secs", "max_tree_size"}
    | {"retry", "timeouts", "limits", "pd", "stream_failure", "requests_per_second", "admission", "breaker", "health"}
)
"""Keys that act in this version, or that only hold others."""
ACTIVE_NESTED = (ACTIVE | {"prefill_score_policy", "decode_score_policy"}) - {"pd"}
"""Of `routingConfig`: its `pd` is AIBrix's, not ours."""

PREFILL_POLICIES = {"prefix_cache": "prefix_cache", "least_request": "least_request", "conductor": "expected_cost"}
DECODE_POLICIES = {"load_balancing": "kv_headroom", "least_request": "least_request", "conductor": "kv_headroom"}
"""AIBrix's score policies, by ours."""
