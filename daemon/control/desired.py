"""What the shards should run on, from what control knows. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from msgspec.structs import replace

from pointsman.config import snapshot as codec
from pointsman.config.keys_file import unknown_profiles
from pointsman.config.load import ProfilesFile
from pointsman.config.pd import PdSection
from pointsman.config.resilience import AdmissionSection, BreakerSection, RetrySection, TimeoutsSection
from pointsman.config.settings import Settings
from pointsman.config.snapshot import (
    KEY_OTHER,
    MODEL_OTHER,
    KeySpec,
    Match,
    Profile,
    Shared,
    Snapshot,
    TlsMaterial,
    WorkerSpec,
)
from pointsman.daemon.routing.cache_aware import CacheAwareParameters
from pointsman.daemon.shm import layout as at
from pointsman.daemon.workers.registry import Worker

MAX_MODELS = 64
"""labels in the metrics, "other" included"""


THRESHOLDS = ("cache_threshold", "balance_abs_threshold", "balance_rel_threshold")
"""Settings that are the defaults of the policy cache_aware."""


class Rules(msgspec.Struct, frozen=True):
    """What a profiles file says."""

    profiles: dict[str, Profile] = {}
    default_profile: str | None = None
    matches: tuple[Match, ...] = ()
    locked_strategy: str = ""
    shared: Shared = Shared()


def rules_of(file: ProfilesFile) -> Rules:
    return _rules(file)


def rules_in(snapshot: Snapshot) -> Rules:
    return _rules(snapshot)


def _rules(source: ProfilesFile | Snapshot) -> Rules:
    return Rules(
        source.profiles,
        source.default_profile,
        source.matches,
        source.locked_strategy,
        source.shared,
    )


class Access(msgspec.Struct, frozen=True):
    """What the key file and the PEM files say: as the fields of these names of Snapshot."""

    keys: tuple[KeySpec, ...] | None = None
    tls: TlsMaterial | None = None
    worker_ca: str = ""


def access_in(snapshot: Snapshot) -> Access:
    return Access(snapshot.keys, snapshot.tls, snapshot.worker_ca)


NO_ACCESS_FILES = Access()


def cross_check(access: Access, rules: Rules) -> Iterator[str]:
    """Warnings of names in one file that the other one does not have."""
    if access.keys is None:
        return
    yield from unknown_profiles(access.keys, rules.profiles)
    for index, match in enumerate(rules.matches):
        if match.key is not None and not any(fnmatchcase(key.name, match.key) for key in access.keys):
            yield f"match[{index}].key: fits the name of no key in the key file"


def compile_snapshot(
    workers: Sequence[Worker],
    rules: Rules,
    settings: Settings,
    known_models: tuple[str, ...],
    access: Access = NO_ACCESS_FILES,
    known_keys: tuple[str, ...] = (),
    content: str = "",
) -> Snapshot:
    """Generation 0: the publisher numbers it. Workers whose name never resolved have no place in it yet."""
    connector = settings.kv_connector
    specs = tuple(_spec(worker, worker.address, connector) for worker in workers if worker.address is not None)
    routing = default_routing(settings)
    return Snapshot(
        generation=0,
        workers=specs,
        profiles={name: _with_defaults(profile, routing) for name, profile in rules.profiles.items()},
        default_profile=rules.default_profile,
        matches=rules.matches,
        default_policy=settings.policy,
        default_routing=routing,
        default_retry=default_retry(settings),
        default_timeouts=default_timeouts(settings),
        default_pd=default_pd(settings),
        locked_strategy=rules.locked_strategy,
        shared=shared_rules(rules.shared, settings),
        strict_models=settings.strict_models,
        models=extend_models(known_models, (model for spec in specs for model in spec.models)),
        keys=access.keys,
        key_names=_extend(known_keys or (KEY_OTHER,), (key.name for key in access.keys or ()), at.KEY_SLOTS),
        tls=access.tls,
        worker_ca=access.worker_ca,
        content=content,
    )


def default_routing(settings: Settings) -> dict[str, Any]:
    """Parameters that the settings (SGLang's flags) give another value than the policies themselves do."""
    usual = CacheAwareParameters()
    chosen = {name: getattr(settings, name) for name in THRESHOLDS if getattr(settings, name) != getattr(usual, name)}
    return {"cache_aware": chosen} if chosen else {}


def default_retry(settings: Settings) -> dict[str, Any]:
    """The settings (SGLang's `--retry-*`) that differ from what `RetrySection` says itself."""
    given = {
        "max_retries": 1 if settings.disable_retries else settings.retry_max_retries,
        "initial_backoff_ms": settings.retry_initial_backoff_ms,
        "max_backoff_ms": settings.retry_max_backoff_ms,
        "backoff_multiplier": settings.retry_backoff_multiplier,
        "jitter_factor": settings.retry_jitter_factor,
    }
    return _changed(given, RetrySection())


def default_timeouts(settings: Settings) -> dict[str, Any]:
    given = {
        "connect_s": settings.connect_timeout_s,
        "total_s": settings.request_timeout_s,
        "client_body_s": settings.body_timeout_s,
    }
    return _changed(given, TimeoutsSection())


def default_pd(settings: Settings) -> dict[str, Any]:
    given = {
        "prefill_policy": settings.prefill_policy,
        "decode_policy": settings.decode_policy,
        "min_uncached_tokens": settings.pd_min_uncached_tokens,
        "decode_without_prefill": settings.pd_decode_without_prefill,
        "kv_lease_s": settings.kv_lease_s,
        "headroom_wait_s": settings.pd_headroom_wait_s,
    }
    return _changed(given, PdSection())


def shared_rules(written: Shared, settings: Settings) -> Shared:
    """What the file says wins, key by key, over the settings (SGLang's `--cb-*`, `--max-concurrent-requests` …)."""
    breaker = {
        "enabled": not settings.disable_circuit_breaker,
        "failure_threshold": settings.cb_failure_threshold,
        "success_threshold": settings.cb_success_threshold,
        "timeout_s": settings.cb_timeout_duration_secs,
        "window_s": settings.cb_window_duration_secs,
    }
    admission = {
        "max_concurrent_requests": max(settings.max_concurrent_requests, 0),
        "queue_size": settings.queue_size,
        "queue_timeout_s": settings.queue_timeout_secs,
    }
    return replace(
        written,
        breaker=_changed(breaker, BreakerSection()) | written.breaker,
        admission=_changed(admission, AdmissionSection()) | written.admission,
    )


def _changed(given: dict[str, Any], usual: msgspec.Struct) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value != getattr(usual, name)}


def _with_defaults(profile: Profile, routing: dict[str, Any]) -> Profile:
    """What the profile itself says wins, key by key."""
    missing = {name: {**given, **profile.routing.get(name, {})} for name, given in routing.items()}
    return replace(profile, routing={**profile.routing, **missing}) if missing else profile


def extend_models(known: tuple[str, ...], seen: Iterable[str]) -> tuple[str, ...]:
    return _extend(known or (MODEL_OTHER,), seen, MAX_MODELS)


def _extend(known: tuple[str, ...], seen: Iterable[str], most: int) -> tuple[str, ...]:
    """Only ever appended to: a name's index is its label in counters that outlive this configuration."""
    names = dict.fromkeys(known)
    for name in seen:
        if len(names) >= most:
            break
        names.setdefault(name)
    return tuple(names)


def content_hash(snapshot: Snapshot) -> str:
    """SHA-256 over everything but the generation number."""
    return hashlib.sha256(codec.encode(replace(snapshot, generation=0))).hexdigest()


def is_same_content(one: Snapshot, other: Snapshot) -> bool:
    return replace(one, generation=other.generation) == other


def _spec(worker: Worker, address: str, kv_connector: str) -> WorkerSpec:
    endpoint, declared = worker.endpoint, worker.declared
    return WorkerSpec(
        id=worker.id,
        url=endpoint.url,
        slot=worker.slot,
        address=address,
        host=endpoint.host,
        port=endpoint.port,
        tls=endpoint.is_tls,
        base_path=endpoint.base_path,
        role=declared.worker_type,
        bootstrap_port=declared.bootstrap_port,
        kv_connector=declared.kv_connector or kv_connector,
        models=worker.models,
        weight=declared.weight,
        labels=declared.labels,
        api_key=declared.api_key,
        prompt_tokens_min=declared.prompt_tokens_min,
        prompt_tokens_max=declared.prompt_tokens_max,
        kv_tokens=declared.kv_tokens,
    )
