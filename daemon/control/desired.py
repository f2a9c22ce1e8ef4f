"""What the shards should run on, from what control knows. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from pointsman.config import snapshot as codec
from pointsman.config.load import ProfilesFile
from pointsman.config.settings import Settings
from pointsman.config.snapshot import MODEL_OTHER, Match, Profile, Snapshot, WorkerSpec
from pointsman.daemon.routing.cache_aware import CacheAwareParameters
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
    eviction_interval_secs: float | None = None
    max_tree_size: int | None = None


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
        source.eviction_interval_secs,
        source.max_tree_size,
    )


def compile_snapshot(
    workers: Sequence[Worker], rules: Rules, settings: Settings, known_models: tuple[str, ...]
) -> Snapshot:
    """Generation 0: the publisher numbers it. Workers whose name never resolved have no place in it yet."""
    specs = tuple(_spec(worker, worker.address) for worker in workers if worker.address is not None)
    routing = default_routing(settings)
    return Snapshot(
        generation=0,
        workers=specs,
        profiles={name: _with_defaults(profile, routing) for name, profile in rules.profiles.items()},
        default_profile=rules.default_profile,
        matches=rules.matches,
        default_policy=settings.policy,
        default_routing=routing,
        locked_strategy=rules.locked_strategy,
        eviction_interval_secs=rules.eviction_interval_secs,
        max_tree_size=rules.max_tree_size,
        strict_models=settings.strict_models,
        models=extend_models(known_models, (model for spec in specs for model in spec.models)),
    )


def default_routing(settings: Settings) -> dict[str, Any]:
    """Parameters that the settings (SGLang's flags) give another value than the policies themselves do."""
    usual = CacheAwareParameters()
    chosen = {name: getattr(settings, name) for name in THRESHOLDS if getattr(settings, name) != getattr(usual, name)}
    return {"cache_aware": chosen} if chosen else {}


def _with_defaults(profile: Profile, routing: dict[str, Any]) -> Profile:
    """What the profile itself says wins, key by key."""
    missing = {name: {**given, **profile.routing.get(name, {})} for name, given in routing.items()}
    return replace(profile, routing={**profile.routing, **missing}) if missing else profile


def extend_models(known: tuple[str, ...], seen: Iterable[str]) -> tuple[str, ...]:
    """Only ever appended to: a model's index is its label in counters that outlive this configuration."""
    models = dict.fromkeys(known or (MODEL_OTHER,))
    for model in seen:
        if len(models) >= MAX_MODELS:
            break
        models.setdefault(model)
    return tuple(models)


def content_hash(snapshot: Snapshot) -> str:
    """SHA-256 over everything but the generation number."""
    return hashlib.sha256(codec.encode(replace(snapshot, generation=0))).hexdigest()


def is_same_content(one: Snapshot, other: Snapshot) -> bool:
    return replace(one, generation=other.generation) == other


def _spec(worker: Worker, address: str) -> WorkerSpec:
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
        models=worker.models,
        weight=declared.weight,
        labels=declared.labels,
        api_key=declared.api_key,
        prompt_tokens_min=declared.prompt_tokens_min,
        prompt_tokens_max=declared.prompt_tokens_max,
        kv_tokens=declared.kv_tokens,
    )
