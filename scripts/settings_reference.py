"""`python -m pointsman.scripts.settings_reference > docs/settings.md`: every key of pointsman.toml, from its model."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from pydantic.fields import FieldInfo

from pointsman.config.models import ServeConfig

HEAD = """\
# Settings

Every key of `pointsman.toml`, made from the code:

    python -m pointsman.scripts.settings_reference > docs/settings.md

The same name is a flag (`--max-payload-size`) and an environment variable (`POINTSMAN_MAX_PAYLOAD_SIZE`). Flags win
over the environment, the environment over the file. A changed key needs a restart. Where *live* names a place in
profiles.json, the value there wins and is in force with the next request.

| key | type | default | live | meaning |
| --- | --- | --- | --- | --- |
"""

LIVE: Mapping[str, str] = MappingProxyType(
    {
        "policy": "`routingStrategy`",
        "cache_threshold": "`cache_aware`",
        "balance_abs_threshold": "`cache_aware`",
        "balance_rel_threshold": "`cache_aware`",
        "eviction_interval_secs": "`shared`",
        "max_tree_size": "`shared`",
        "body_timeout_s": "`timeouts.client_body_s`",
        "connect_timeout_s": "`timeouts.connect_s`",
        "request_timeout_s": "`timeouts.total_s`",
        "retry_max_retries": "`retry`",
        "retry_initial_backoff_ms": "`retry`",
        "retry_max_backoff_ms": "`retry`",
        "retry_backoff_multiplier": "`retry`",
        "retry_jitter_factor": "`retry`",
        "disable_retries": "`retry`",
        "cb_failure_threshold": "`shared.breaker`",
        "cb_success_threshold": "`shared.breaker`",
        "cb_timeout_duration_secs": "`shared.breaker`",
        "cb_window_duration_secs": "`shared.breaker`",
        "disable_circuit_breaker": "`shared.breaker`",
        "max_concurrent_requests": "`shared.admission`",
        "queue_size": "`shared.admission`",
        "queue_timeout_secs": "`shared.admission`",
        "health_interval_s": "`shared.health`",
        "health_down_interval_s": "`shared.health`",
        "health_failure_threshold": "`shared.health`",
        "health_success_threshold": "`shared.health`",
    }
)
"""Keys that profiles.json can say anew, and where."""

_NAMES: Mapping[object, str] = MappingProxyType(
    {bool: "true, false", int: "whole number", float: "number", str: "text"}
)


def render() -> str:
    return HEAD + "".join(_row(key, field) for key, field in ServeConfig.model_fields.items())


def _row(key: str, field: FieldInfo) -> str:
    meaning, _, told = (field.description or "").partition("; default: ")
    cells = (f"`{key}`", ", ".join(_kind(field)), told or _default(field.default), LIVE.get(key, ""), meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _kind(field: FieldInfo) -> Iterator[str]:
    """Type and bounds."""
    annotation = next((kind for kind in typing.get_args(field.annotation) if kind in _NAMES), field.annotation)
    origin = typing.get_origin(field.annotation)
    if origin is typing.Literal:
        yield ", ".join(f"`{choice}`" for choice in typing.get_args(field.annotation))
    else:
        yield "list of text" if origin is tuple else _NAMES[annotation]
    for word, bound in (("from", "ge"), ("to", "le")):
        values = (getattr(rule, bound, None) for rule in field.metadata)
        yield from (f"{word} {_shortest(value)}" for value in values if value is not None)


def _shortest(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _default(value: object) -> str:
    if value in (None, ()):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    if isinstance(value, float):
        return f"`{_shortest(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(render(), end="")
