"""The API keys of one generation, compiled for the request path. Pure.

A key is found by its SHA-256: what the client shows is hashed, then looked up. However the lookup's time depends on the
digest, it tells nothing about any key, since nobody can choose what a digest begins with; and no process keeps a key in
clear, not even in a cache (hashing costs 0.6 µs, less than such a cache would be worth).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import translate
from hashlib import sha256
from re import Pattern
from re import compile as compile_pattern

import orjson

from pointsman.config.resilience import LimitsSection
from pointsman.config.snapshot import KeySpec
from pointsman.daemon.errors import key_not_allowed

_BEARER = b"bearer "


class Key:
    """What a request may do that shows this key."""

    __slots__ = ("_models", "_patterns", "_profiles", "id", "label", "limits", "may_steer", "name", "name_json", "user")

    def __init__(self, spec: KeySpec, label: int) -> None:
        self.name = spec.name
        self.name_json = orjson.dumps(spec.name)
        self.id = int.from_bytes(sha256(spec.name.encode()).digest()[:8], "big", signed=True)
        """64 bits, the same on every shard and in every generation: rates are kept by it"""
        self.label = label
        """index into the counters of keys"""
        self.user = spec.user
        self.limits = limits_of(spec)
        """of this key alone; None: as the profile says"""
        self.may_steer = spec.may_steer
        self._models = frozenset(spec.models)
        self._patterns: tuple[Pattern[str], ...] = tuple(compile_pattern(translate(model)) for model in spec.models)
        self._profiles = frozenset(spec.profiles)

    def may_use(self, model: str) -> bool:
        models = self._models
        return not models or model in models or any(pattern.match(model) for pattern in self._patterns)

    def check_model(self, model: str) -> None:
        """Raises RequestError 403; a request that names no model may end at any."""
        if not self.may_use(model):
            what = f"the model {model[:128]!r}" if model else "a request that names no model"
            raise key_not_allowed("model_not_allowed", f"this key is not good for {what}", param="model")

    def check_profile(self, profile: str) -> None:
        """`profile` is the one in force, whoever chose it; "" = none. Raises RequestError 403."""
        if self._profiles and profile not in self._profiles:
            what = f"the profile {profile[:128]!r}" if profile else "a request without a profile"
            names = ", ".join(sorted(self._profiles))
            message = f"this key is not good for {what}; ask for one of these with the header config-profile: {names}"
            raise key_not_allowed("profile_not_allowed", message)


def limits_of(spec: KeySpec) -> LimitsSection | None:
    if not (spec.requests_per_minute or spec.tokens_per_minute):
        return None
    return LimitsSection(key_requests_per_minute=spec.requests_per_minute, key_tokens_per_minute=spec.tokens_per_minute)


class KeyRing:
    def __init__(self, specs: Iterable[KeySpec], names: Sequence[str]) -> None:
        """`names`: Snapshot.key_names."""
        labels = {name: label for label, name in enumerate(names)}
        self._keys = {spec.digest: Key(spec, labels.get(spec.name, 0)) for spec in specs}
        self._by_name = {key.name.encode(): key for key in self._keys.values()}

    def named(self, name: bytes) -> Key | None:
        return self._by_name.get(name)

    def find(self, authorization: bytes | None, api_key: bytes | None) -> Key | None:
        """By the headers `Authorization: Bearer …` or, without that, `X-Api-Key`."""
        if authorization is not None and authorization[:7].lower() == _BEARER:
            return self._keys.get(sha256(authorization[7:].strip()).digest())
        return None if api_key is None else self._keys.get(sha256(api_key).digest())
