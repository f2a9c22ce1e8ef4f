"""From registry and rules to a snapshot."""

from typing import Any

import pytest
from msgspec.structs import replace

from pointsman.config.load import DeclaredWorker
from pointsman.config.settings import Settings
from pointsman.config.snapshot import MAX_TOKENS, MODEL_OTHER, Hints, Match, Profile, Shared, decode, encode
from pointsman.daemon.control.desired import (
    MAX_MODELS,
    THRESHOLDS,
    Rules,
    compile_snapshot,
    content_hash,
    extend_models,
    is_same_content,
    rules_in,
)
from pointsman.daemon.routing.cache_aware import CacheAwareParameters
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.workers.address import parse
from pointsman.daemon.workers.registry import Worker

SETTINGS = Settings(runtime_dir="", state_dir="", policy="round_robin", strict_models=True)


def worker(slot: int, address: str | None = "10.0.0.5", **fields: object) -> Worker:
    declared = DeclaredWorker(url=f"https://gpu-{slot}:8000/base", **fields)  # type: ignore[arg-type]
    return Worker(f"id-{slot}", parse(declared.url), slot, "api", declared, address)


def test_a_snapshot_says_what_was_declared() -> None:
    rules = Rules({"fast": Profile("fast", "random")}, "fast", (Match("fast", model="m*"),))
    declared = worker(3, models=("m",), weight=2.0, labels={"gpu": "a100"}, api_key="k", worker_type="decode")
    snapshot = compile_snapshot([declared], rules, SETTINGS, ())
    (spec,) = snapshot.workers
    assert (spec.slot, spec.address, spec.host, spec.port) == (3, "10.0.0.5", "gpu-3", 8000)
    assert (spec.tls, spec.base_path, spec.role) == (True, "/base", "decode")
    assert (spec.models, spec.weight, spec.labels, spec.api_key) == (("m",), 2.0, {"gpu": "a100"}, "k")
    assert (snapshot.default_policy, snapshot.strict_models, snapshot.models) == ("round_robin", True, ("other", "m"))
    assert rules_in(decode(encode(snapshot))) == rules


def test_a_snapshot_says_what_workers_take_and_hold() -> None:
    declared = worker(0, prompt_tokens_min=5, prompt_tokens_max=9, kv_tokens=1000)
    (bounded, free) = compile_snapshot([declared, worker(1)], Rules(), SETTINGS, ()).workers
    assert (bounded.prompt_tokens_min, bounded.prompt_tokens_max, bounded.kv_tokens) == (5, 9, 1000)
    assert (free.prompt_tokens_min, free.prompt_tokens_max, free.kv_tokens) == (0, MAX_TOKENS, None)


def test_a_snapshot_says_what_is_shared() -> None:
    rules = Rules(locked_strategy="random", shared=Shared(3.0, 5000))
    snapshot = compile_snapshot([], rules, SETTINGS, ())
    assert (snapshot.locked_strategy, snapshot.shared) == ("random", Shared(3.0, 5000))
    assert rules_in(decode(encode(snapshot))) == rules


def test_thresholds_of_the_settings_are_the_defaults_of_cache_aware_everywhere() -> None:
    profile = Profile("p", routing={"cache_aware": {"cache_threshold": 0.9}, "sticky": {"factor": 3.0}})
    rules = Rules({"p": profile, "q": Profile("q", "random")})
    usual = compile_snapshot([], rules, SETTINGS, ())
    assert usual.default_routing == {}
    assert usual.profiles == rules.profiles
    settings = replace(SETTINGS, policy="cache_aware", cache_threshold=0.5, balance_abs_threshold=32)
    snapshot = compile_snapshot([], rules, settings, ())
    assert snapshot.default_routing == {"cache_aware": {"cache_threshold": 0.5, "balance_abs_threshold": 32}}
    assert snapshot.profiles["p"].routing == {
        "cache_aware": {"cache_threshold": 0.9, "balance_abs_threshold": 32},
        "sticky": {"factor": 3.0},
    }
    assert snapshot.profiles["q"].routing == snapshot.default_routing
    again = compile_snapshot([], rules_in(snapshot), settings, ())
    assert is_same_content(again, snapshot)
    RoutingTable(snapshot)


def test_the_settings_have_the_defaults_of_cache_aware() -> None:
    parameters = CacheAwareParameters()
    assert all(getattr(SETTINGS, name) == getattr(parameters, name) for name in THRESHOLDS)


@pytest.mark.parametrize(
    "changed",
    [
        {"routing": {"sticky": {"factor": 2.5}}},
        {"routing": {"chain": [{"scorer": "random", "keep": 2}]}},
        {"hints": Hints(prompt_tokens_gte=5)},
        {"prompt_tokens_max": 10},
        {"strategy": "random:2,least_request"},
    ],
)
def test_a_change_of_parameters_alone_is_another_content(changed: dict[str, Any]) -> None:
    before = compile_snapshot([], Rules({"p": Profile("p")}), SETTINGS, ())
    after = compile_snapshot([], Rules({"p": replace(Profile("p"), **changed)}), SETTINGS, ())
    assert not is_same_content(before, after)
    assert content_hash(before) != content_hash(after)


def test_a_worker_without_an_address_has_no_place_yet() -> None:
    assert compile_snapshot([worker(0, None), worker(1)], Rules(), SETTINGS, ()).workers[0].slot == 1


def test_model_labels_are_only_ever_appended_to() -> None:
    known = extend_models((), ["a", "b"])
    assert known == (MODEL_OTHER, "a", "b")
    assert extend_models(known, ["c", "a"]) == (MODEL_OTHER, "a", "b", "c")
    assert extend_models(known, []) == known


def test_model_labels_are_bounded() -> None:
    models = extend_models((), (f"m{number}" for number in range(1000)))
    assert len(models) == MAX_MODELS
    assert extend_models(models, ["late"]) == models


def test_the_hash_is_of_the_content_not_of_the_number() -> None:
    snapshot = compile_snapshot([worker(0)], Rules(), SETTINGS, ())
    later = replace(snapshot, generation=7)
    assert content_hash(snapshot) == content_hash(later)
    assert is_same_content(snapshot, later)
    other = compile_snapshot([worker(0, weight=2.0)], Rules(), SETTINGS, ())
    assert content_hash(snapshot) != content_hash(other)
    assert not is_same_content(snapshot, other)
