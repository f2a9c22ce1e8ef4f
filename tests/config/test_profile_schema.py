"""What of a profiles file reaches the snapshot, in every nesting and spelling; and that routing takes all of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.config import profile_parameters
from pointsman.config.load import DEFAULT_PROFILES, ProfilesFile, load_profiles
from pointsman.config.profiles_file import PROFILE_SECTIONS, SHARED_SECTIONS
from pointsman.config.profiles_schema import ProfileSection, ProfilesSection, RoutingConfig, SharedSection
from pointsman.config.snapshot import MAX_TOKENS, Hints, Profile, Shared, Snapshot, decode, encode
from pointsman.config.workers_schema import Capacity
from pointsman.daemon.errors import ConfigErrors
from pointsman.daemon.routing.chain import Stage
from pointsman.daemon.routing.checking import SECTIONS, FileCheck
from pointsman.daemon.routing.costs import ALL_SCORERS
from pointsman.daemon.routing.strategies import STRATEGIES, RoutingProfile, build, read_profile
from pointsman.daemon.routing.table import RoutingTable

EXAMPLES = DEFAULT_PROFILES.parent / "examples"


def read(directory: Path, value: Any, name: str = "p.json") -> ProfilesFile:
    path = directory / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return load_profiles(path, FileCheck())


def profile_of(directory: Path, **keys: Any) -> Profile:
    return read(directory, {"profiles": {"a": keys}}).profiles["a"]


def takes(profile: Profile) -> RoutingProfile:
    found = read_profile({"routingStrategy": profile.strategy, **profile.routing})
    build(found)
    return found


# --- strategies


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_may_stand_alone(tmp_path: Path, name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        assert profile_of(tmp_path, routingStrategy=spelling).strategy == spelling


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("least-request:40,prefix-cache:60", "least-request:40,prefix-cache:60"),
        (" least-request : 2 , prefix-cache ", "least-request : 2 , prefix-cache"),
        ("least-request,\r\n\tprefix-cache", "least-request, prefix-cache"),
        ("nonsense:0,random", "nonsense:0,random"),
        ("random,random:3", "random,random:3"),
    ],
)
def test_a_strategy_is_kept_as_written_on_one_line(tmp_path: Path, written: str, kept: str) -> None:
    profile = profile_of(tmp_path, routingStrategy=written)
    assert profile.strategy == kept
    takes(profile)


@pytest.mark.parametrize("written", ["", "  ", None])
def test_no_strategy_is_the_daemons_policy(tmp_path: Path, written: str | None) -> None:
    assert profile_of(tmp_path, routingStrategy=written).strategy is None


def test_pairs_may_be_asked_for_but_not_locked(tmp_path: Path) -> None:
    """As in AIBrix, `pd` among others stands alone."""
    found = read(tmp_path, {"profiles": {"a": {"routingStrategy": "least-request,pd:2"}}})
    assert not found.warnings
    assert RoutingTable(Snapshot(1, profiles=found.profiles)).plan_of(found.profiles["a"]).is_pd
    with pytest.raises(ConfigErrors, match="lockedRoutingStrategy: 'pd' cannot be locked"):
        read(tmp_path, {"profiles": {}, "lockedRoutingStrategy": "pd"})


def test_the_first_example_of_aibrix_loads_as_it_is() -> None:
    found = load_profiles(EXAMPLES / "aibrix_profiles.json", FileCheck())
    assert found.default_profile == "pd"
    assert found.profiles == {
        "default": Profile("default", "random", prompt_tokens_max=4096),
        "pd": found.profiles["pd"],
        "low-latency": Profile("low-latency", "least-latency", prompt_tokens_max=2048),
    }
    assert (found.profiles["pd"].strategy, found.profiles["pd"].prompt_tokens_max) == ("pd", 2048)
    assert not found.warnings
    assert RoutingTable(Snapshot(1, profiles=found.profiles, default_profile=found.default_profile)).generation == 1


# --- the top


@pytest.mark.parametrize(
    "shared",
    [
        {"eviction_interval_secs": 7, "max_tree_size": 4096},
        {"evictionIntervalSecs": 7.0, "maxTreeSize": 4096, "description": "x"},
    ],
)
def test_lock_and_shared_section(tmp_path: Path, shared: dict[str, Any]) -> None:
    found = read(tmp_path, {"profiles": {}, "lockedRoutingStrategy": "prefix-cache:2,random", "shared": shared})
    assert found.locked_strategy == "prefix-cache:2,random"
    assert (found.shared.eviction_interval_secs, found.shared.max_tree_size) == (7.0, 4096)
    assert not found.warnings


def test_without_them_the_settings_count(tmp_path: Path) -> None:
    values: tuple[dict[str, Any], ...] = (
        {"profiles": {}},
        {"profiles": {}, "shared": {}},
        {"profiles": {}, "shared": None},
    )
    for value in values:
        found = read(tmp_path, value)
        assert (found.locked_strategy, found.shared) == ("", Shared())


def test_sections_of_shared_in_any_spelling(tmp_path: Path) -> None:
    sections = {"admission": {"queueSize": 1}, "breaker": {"timeout_s": 7}, "health": {"interval-s": 2}}
    found = read(tmp_path, {"profiles": {}, "shared": sections})
    assert not found.warnings
    assert (found.shared.admission, found.shared.breaker) == ({"queue_size": 1}, {"timeout_s": 7.0})
    assert found.shared.health == {"interval_s": 2.0}


# --- hints and buckets


def test_hints_stand_at_either_nesting_and_routing_config_wins(tmp_path: Path) -> None:
    profile = profile_of(
        tmp_path,
        promptTokensGte=1,
        promptTokensLt=20,
        maxTokensLt=4,
        routingConfig={"promptTokensGte": 10, "maxTokensGte": 3},
    )
    assert profile.hints == Hints(10, 20, 3, 4)


def test_a_bucket_stands_at_either_nesting_and_routing_config_wins(tmp_path: Path) -> None:
    old = profile_of(tmp_path, promptLenBucketMinLength=5, promptLenBucketMaxLength=9)
    assert (old.prompt_tokens_min, old.prompt_tokens_max) == (5, 9)
    both = profile_of(
        tmp_path, promptLenBucketMinLength=50, promptLenBucketMaxLength=9, routingConfig={"promptLenBucketMinLength": 4}
    )
    assert (both.prompt_tokens_min, both.prompt_tokens_max) == (4, 9)


def test_no_upper_bound_may_be_written_as_nought(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, promptLenBucketMinLength=5, promptLenBucketMaxLength=0)
    assert (profile.prompt_tokens_min, profile.prompt_tokens_max) == (5, MAX_TOKENS)


def test_hints_that_never_fit_are_warned_about(tmp_path: Path) -> None:
    found = read(tmp_path, {"profiles": {"a": {"routingConfig": {"promptTokensGte": 9, "promptTokensLt": 9}}}})
    (warning,) = found.warnings
    assert warning.startswith("profiles.a.routingConfig.promptTokensLt: not above the lower bound (9)")


# --- parameters


def test_the_sections_are_those_of_routing() -> None:
    fields = set(RoutingProfile.__struct_fields__) - {"strategy", "locked"}
    assert set(profile_parameters.SECTIONS) == fields == {*SECTIONS, "chain"}


@pytest.mark.parametrize("name", ["cache_aware", "cache-aware", "cacheAware"])
@pytest.mark.parametrize("key", ["cache_threshold", "cache-threshold", "cacheThreshold"])
@pytest.mark.parametrize("is_nested", [True, False])
def test_a_section_in_every_spelling_at_either_nesting(tmp_path: Path, name: str, key: str, is_nested: bool) -> None:
    keys: dict[str, Any] = {name: {key: 1}}
    profile = profile_of(tmp_path, **({"routingConfig": keys} if is_nested else keys))
    assert profile.routing == {"cache_aware": {"cache_threshold": 1.0}}
    assert takes(profile).cache_aware.cache_threshold == 1.0


def test_every_section_reaches_routing(tmp_path: Path) -> None:
    profile = profile_of(
        tmp_path,
        sticky={"factor": 3, "idleSecs": 60},
        chain=[{"scorer": "prefix-cache", "within": 10}, {"scorer": "least-request", "keep": 2, "weight": 1}],
        routingConfig={
            "cacheAware": {"cache_threshold": 0.5, "balanceAbsThreshold": 8, "miss": "smallest_tree"},
            "expected-cost": {"theta": 0, "kappa_s": 0.1},
            "dynamo": {"temperature": 0.5},
            "llmD": {"prefix": 5},
            "consistent_hash": {"load_factor": 1.5},
            "prefixHash": {"headChars": 2048, "slack": 3},
        },
    )
    found = takes(profile)
    assert found.sticky is not None
    assert (found.sticky.factor, found.sticky.idle_secs) == (3.0, 60.0)
    assert [(stage.scorer, stage.keep, stage.within, stage.weight) for stage in found.chain] == [
        ("prefix-cache", None, 10.0, 0.0),
        ("least-request", 2, None, 1.0),
    ]
    assert (found.cache_aware.balance_abs_threshold, found.cache_aware.miss) == (8, "smallest_tree")
    assert (found.expected_cost.theta, found.expected_cost.kappa_s) == (0.0, 0.1)
    assert (found.dynamo.temperature, found.llm_d.prefix, found.consistent_hash.load_factor) == (0.5, 5.0, 1.5)
    assert (found.prefix_hash.head_chars, found.prefix_hash.slack) == (2048, 3)


def test_an_empty_sticky_is_on_and_none_is_off(tmp_path: Path) -> None:
    assert profile_of(tmp_path, sticky={}).routing == {"sticky": {}}
    assert profile_of(tmp_path, sticky=None).routing == {}


def test_parameters_of_the_tree_belong_into_the_shared_section(tmp_path: Path) -> None:
    written = {"max-tree-size": 5000, "evictionIntervalSecs": 3, "cache_threshold": 0.1}
    found = read(tmp_path, {"profiles": {"a": {"routingConfig": {"cacheAware": written}}}})
    remedy = "without effect: one tree for all profiles; set it under shared"
    assert found.warnings == (
        f"profiles.a.routingConfig.cacheAware.evictionIntervalSecs: {remedy}",
        f"profiles.a.routingConfig.cacheAware.max-tree-size: {remedy}",
    )
    takes(found.profiles["a"])


def test_a_strategy_beside_a_chain_is_warned_about(tmp_path: Path) -> None:
    found = read(tmp_path, {"profiles": {"a": {"routingStrategy": "random", "chain": [{"scorer": "random"}]}}})
    assert found.warnings == ("profiles.a.routingStrategy: without effect: the profile's chain goes before it",)


def test_limits_are_warned_about_unless_they_are_off(tmp_path: Path) -> None:
    inert = {"requestsPerSecondPerReplica": 1, "requestsInflight": 2}
    later = {"combined": True, "pd": {"decodeAbortTimeout": 1}}
    off = {"requestsPerSecond": 0, "requestsInflight": 0, "combined": False, "routingConfig": {"combined": False}}
    found = read(tmp_path, {"profiles": {"a": {**inert, "routingConfig": later}, "b": off}})
    keys = [warning.partition(":")[0].removeprefix("profiles.a.") for warning in found.warnings]
    assert keys == ["requestsPerSecondPerReplica", "requestsInflight", *(f"routingConfig.{key}" for key in later)]


def test_settings_of_pairs(tmp_path: Path) -> None:
    given = {"prefillPolicy": "least-request", "kv_lease_s": 5, "minUncachedTokens": 64}
    assert profile_of(tmp_path, pd=given).pd == {
        "prefill_policy": "least-request",
        "kv_lease_s": 5.0,
        "min_uncached_tokens": 64,
    }
    with pytest.raises(ConfigErrors, match=r"profiles\.a\.pd\.decode_policy: unknown policy 'randm'"):
        profile_of(tmp_path, pd={"decode_policy": "randm"})
    with pytest.raises(ConfigErrors, match="prefillScorePolicy: unknown policy 'x'"):
        profile_of(tmp_path, routingConfig={"prefillScorePolicy": "x"})


def test_sections_of_resilience(tmp_path: Path) -> None:
    sections = {
        "retry": {"maxRetries": 2, "retryable_status": [503]},
        "timeouts": {"first_token_s": 3},
        "limits": {"priority": "bulk"},
        "requestsPerSecond": 7,
        "streamFailure": "continue",
    }
    profile = profile_of(tmp_path, **sections)
    assert profile.retry == {"max_retries": 2, "retryable_status": [503]}
    assert (profile.timeouts, profile.stream_failure) == ({"first_token_s": 3.0}, "continue")
    assert profile.limits == {"priority": "bulk", "requests_per_second": 7.0}


def test_a_section_says_more_than_aibrixs_key(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, requestsPerSecond=7, limits={"requests_per_second": 3})
    assert profile.limits == {"requests_per_second": 3.0}


def test_every_flaw_of_a_section_has_its_place(tmp_path: Path) -> None:
    retry = {"max_retries": 101, "retrys": 1, "jitterFactor": "x", "retryable_status": [200]}
    with pytest.raises(ConfigErrors) as caught:
        read(tmp_path, {"profiles": {"a": {"retry": retry}}, "shared": {"breaker": {"timeout_s": 0}}})
    text = str(caught.value)
    assert "profiles.a.retry.max_retries: expected at most 100, got 101" in text
    assert "profiles.a.retry.retrys: unknown key" in text
    assert "profiles.a.retry.jitterFactor: expected a number, got a string" in text
    assert "profiles.a.retry.retryable_status: expected at least 400" in text
    assert "shared.breaker.timeout_s: expected more than 0, got 0" in text


def test_a_rule_with_a_bucket_hides_nothing(tmp_path: Path) -> None:
    profiles = {"a": {"promptLenBucketMaxLength": 9}, "b": {}}
    assert not read(tmp_path, {"profiles": profiles, "match": [{"profile": "a"}, {"profile": "b"}]}).warnings


def test_formats_mean_the_same(tmp_path: Path) -> None:
    toml = """
[profiles.a]
routingStrategy = "least-request:2,prefix-cache"
[profiles.a.sticky]
factor = 3.0
[[profiles.a.chain]]
scorer = "prefix-cache"
within = 10
[profiles.a.routingConfig]
promptTokensGte = 5
[shared]
max_tree_size = 5000
"""
    yaml = """
profiles:
  a:
    routingStrategy: least-request:2,prefix-cache
    sticky: {factor: 3}
    chain: [{scorer: prefix-cache, within: 10}]
    routingConfig: {promptTokensGte: 5}
shared: {maxTreeSize: 5000}
"""
    one, other = read(tmp_path, toml, "p.toml"), read(tmp_path, yaml, "p.yaml")
    assert msgspec.structs.replace(one, digest="") == msgspec.structs.replace(other, digest="")


# --- whatever is valid, routing takes


def numbers(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most) | st.integers(int(least), int(most))


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


weighted = st.lists(
    st.tuples(st.sampled_from(sorted(ALL_SCORERS)), st.integers(1, 10**6)).map(lambda pair: f"{pair[0]}:{pair[1]}"),
    min_size=1,
    max_size=4,
).map(",".join)
strategies = st.sampled_from(sorted(STRATEGIES)) | weighted
stages = st.builds(
    lambda scorer, more: {"scorer": scorer, **more},
    st.sampled_from(sorted(ALL_SCORERS)),
    maybe(keep=st.none() | st.integers(1, 9), within=st.none() | numbers(0, 100), weight=numbers(0, 10)),
)
keyed = maybe(load_factor=numbers(1, 10), slack=st.integers(0, 9), head_chars=st.integers(1, 10**6))
sections = {
    "chain": st.lists(stages, max_size=4),
    "sticky": st.none() | maybe(factor=numbers(1, 10), idle_secs=numbers(0, 1e6)),
    "cache_aware": maybe(
        cache_threshold=numbers(0, 1),
        balance_abs_threshold=st.integers(0, 10**6),
        balance_rel_threshold=numbers(0, 100),
        eviction_interval_secs=numbers(0, 1e6),
        max_tree_size=st.integers(1, 2**50),
        miss=st.sampled_from(["smallest_tree", "least_load"]),
        holder=st.sampled_from(["first", "least_load"]),
    ),
    "expected_cost": maybe(theta=numbers(0, 9), theta_gain=numbers(0, 99), gamma=numbers(0, 9), kappa_s=numbers(0, 9)),
    "dynamo": maybe(temperature=numbers(0, 9), prefill_load_scale=numbers(0, 9), overlap_weight=numbers(0, 9)),
    "llm_d": maybe(queue=numbers(0, 9), kv=numbers(0, 9), prefix=numbers(0, 9)),
    "consistent_hash": keyed,
    "prefix_hash": keyed,
}
hints = {key: st.integers(0, 10**6) for key in ("promptTokensGte", "promptTokensLt", "maxTokensGte", "maxTokensLt")}
profiles = st.builds(
    lambda outer, nested, is_nested: {**outer, "routingConfig": nested} if is_nested else {**outer, **nested},
    maybe(routingStrategy=strategies),
    maybe(**sections, **hints),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), profiles, min_size=1, max_size=3), st.none() | strategies)
def test_whatever_a_valid_file_says_routing_takes_it(written: dict[str, Any], locked: str | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = read(Path(directory), {"profiles": written, "lockedRoutingStrategy": locked})
    for profile in found.profiles.values():
        taken = takes(profile)
        assert bool(taken.chain) == bool(profile.routing.get("chain"))
    snapshot = Snapshot(1, profiles=found.profiles, locked_strategy=found.locked_strategy)
    assert decode(encode(snapshot)) == snapshot
    RoutingTable(snapshot)


def test_the_reference_has_every_strategy_and_every_key() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "configuration.md").read_text() + (docs / "resilience.md").read_text()
    sections = SECTIONS | PROFILE_SECTIONS | SHARED_SECTIONS
    structs: list[type[msgspec.Struct]] = [*sections.values(), Stage]
    parameters = {name for struct in structs for name in struct.__struct_fields__}
    models = (ProfilesSection, ProfileSection, RoutingConfig, SharedSection)
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    capacity = {field.alias or name for name, field in Capacity.model_fields.items()}
    missing = {name for name in STRATEGIES | parameters | keys | capacity if f"`{name}" not in text}
    assert not missing
