"""What `--policy` may say: a profile of `--profile FILE`, or a strategy with parameters.

For example `expected_cost`, `least-request:40,prefix-cache:60`, `cache_aware?miss=smallest_tree&holder=first`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from pointsman.config import documents
from pointsman.daemon.errors import ConfigError, ConfigErrors, RequestError
from pointsman.daemon.routing.policies import canonical
from pointsman.daemon.routing.strategies import RoutingProfile, build, read_profile

DEFAULT_POLICIES = ("cache_aware", "expected_cost")


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    profile: RoutingProfile


def read_contestants(names: Sequence[str], profile_file: Path | None) -> list[Contestant]:
    """In the order asked for; without names all profiles of the file, else DEFAULT_POLICIES. Raises ConfigErrors."""
    profiles = _profiles(profile_file) if profile_file is not None else {}
    wanted = names or tuple(profiles) or DEFAULT_POLICIES
    return [_contestant(name, profiles, str(profile_file)) for name in wanted]


def _profiles(path: Path) -> dict[str, Any]:
    value = documents.read(path).value
    found = value.get("profiles") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(found, dict):
        raise ConfigErrors([ConfigError(str(path), "has no profiles", key="profiles")])
    locked = value.get("lockedRoutingStrategy")
    return {name: {**(profile or {}), "lockedRoutingStrategy": locked} for name, profile in found.items()}


def _contestant(name: str, profiles: Mapping[str, Any], source: str) -> Contestant:
    try:
        profile = read_profile(profiles[name]) if name in profiles else parse_policy(name)
        build(profile, profile.locked or None)
    except RequestError as error:
        place = (source, f"profiles.{name}") if name in profiles else ("--policy", "")
        raise ConfigErrors([ConfigError(place[0], error.message, key=place[1])]) from None
    return Contestant(name, profile)


def parse_policy(text: str) -> RoutingProfile:
    """`STRATEGY[?parameter=value&…]`; parameters are those of the strategy's section in a profile.

    Raises RequestError 400.
    """
    strategy, _, query = text.partition("?")
    if not query:
        return RoutingProfile(strategy)
    section = dict(parse_qsl(query, keep_blank_values=True))
    typed = {key: _value(value) for key, value in section.items()}
    return read_profile({"routingStrategy": strategy, canonical(strategy): typed})


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
