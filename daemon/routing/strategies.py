"""From a profile to a policy: every name a strategy may have, and the parameters that each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec

from pointsman.daemon.errors import bad_request
from pointsman.daemon.routing.cache_aware import CacheAware, CacheAwareParameters
from pointsman.daemon.routing.chain import Narrowing, Stage, Weighted, bad_strategy, is_exclusive, parse_strategy
from pointsman.daemon.routing.costs import (
    ALL_SCORERS,
    DynamoParameters,
    LeastCost,
    LlmD,
    LlmDParameters,
    dynamo_costs,
    kv_headroom_costs,
    lmetric_costs,
)
from pointsman.daemon.routing.counting import Counting
from pointsman.daemon.routing.expected_cost import ExpectedCost, ExpectedCostParameters
from pointsman.daemon.routing.keyed import Keyed, KeyedParameters
from pointsman.daemon.routing.picking import Policy
from pointsman.daemon.routing.policies import POLICIES, canonical
from pointsman.daemon.routing.prefix_cache import PrefixCache
from pointsman.daemon.routing.scorers import Scorer

DEFAULT_STRATEGY = "expected_cost"
PD = "pd"
"""The strategy that pairs a prefill with a decode worker; each is picked by a policy of its own (`table`)."""


class StickyParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session stays with its worker while its expected cost is at most `factor` times the best one."""

    factor: float = 2.0
    idle_secs: float = 7200.0


class RoutingProfile(msgspec.Struct, frozen=True):
    """How one request is routed. `chain` (ranked narrowing) goes before `strategy`."""

    strategy: str = DEFAULT_STRATEGY
    locked: str = ""
    """`lockedRoutingStrategy`: wins over the request's header."""
    chain: tuple[Stage, ...] = ()
    sticky: StickyParameters | None = None
    cache_aware: CacheAwareParameters = CacheAwareParameters()
    expected_cost: ExpectedCostParameters = ExpectedCostParameters()
    dynamo: DynamoParameters = DynamoParameters()
    llm_d: LlmDParameters = LlmDParameters()
    consistent_hash: KeyedParameters = KeyedParameters()
    prefix_hash: KeyedParameters = KeyedParameters()

    def tree_limits(self) -> tuple[float, int | None]:
        """(seconds between evictions, characters per worker) of a tree that does not follow the engines' memory."""
        if self.chain or canonical(self.locked or self.strategy) != "cache_aware":
            return 0.0, None
        return self.cache_aware.eviction_interval_secs, self.cache_aware.max_tree_size


_SINGLE: dict[str, Callable[[RoutingProfile], Policy]] = {
    **{name: partial(lambda name, _: Counting(name), name) for name in POLICIES},
    "expected_cost": lambda profile: ExpectedCost(profile.expected_cost),
    "cache_aware": lambda profile: CacheAware(profile.cache_aware),
    "prefix_cache": lambda _: PrefixCache(),
    "kv_headroom": lambda _: LeastCost("kv_headroom", kv_headroom_costs),
    "lmetric": lambda _: LeastCost("lmetric", lmetric_costs),
    "dynamo": lambda profile: LeastCost(
        "dynamo", partial(dynamo_costs, parameters=profile.dynamo), temperature=profile.dynamo.temperature
    ),
    "llm_d": lambda profile: LlmD(profile.llm_d),
    "consistent_hash": lambda profile: Keyed(profile.consistent_hash),
    "prefix_hash": lambda profile: Keyed(profile.prefix_hash, is_prefix=True),
}
"""Names with a policy of their own; every other scorer alone is argmax of its score."""

STRATEGIES = frozenset({*_SINGLE, *ALL_SCORERS})
"""Every name that stands alone, canonical."""


def read_profile(profile: str | Mapping[str, Any] | RoutingProfile) -> RoutingProfile:
    """A strategy, a profile of a profiles file (AIBrix's keys, ours also under `routingConfig`), or itself.

    Keys that do not concern the choice of a worker are ignored. Raises RequestError 400 on parameters that do not
    exist or have another type.
    """
    if isinstance(profile, RoutingProfile):
        return profile
    if isinstance(profile, str):
        return RoutingProfile(profile)
    merged = {**(profile.get("routingConfig") or {}), **profile}
    known = {canonical(key): value for key, value in merged.items()}
    for written, field in (("routingStrategy", "strategy"), ("lockedRoutingStrategy", "locked")):
        if merged.get(written):
            known[field] = merged[written]
    try:
        return msgspec.convert(known, RoutingProfile)
    except msgspec.ValidationError as error:
        raise bad_request(f"bad routing profile: {error}", code="invalid_routing_profile") from None


def effective_strategy(profile: RoutingProfile, asked: str | None) -> str | None:
    """Precedence: locked > header `routing-strategy` > profile. None: the profile's own (perhaps a chain)."""
    return profile.locked or asked or None


def build(profile: RoutingProfile, strategy: str | None = None) -> Policy:
    """The policy of `strategy` with the profile's parameters; None = of the profile itself.

    Raises RequestError 400 for a strategy that does not exist or cannot be weighed against others.
    """
    if strategy is None and profile.chain:
        return Narrowing([(_scorer(stage.scorer, stage.scorer), stage) for stage in profile.chain])
    text = strategy or profile.strategy
    entries = parse_strategy(text)
    if len(entries) > 1:
        return Weighted([(_scorer(text, entry.name), entry.weight) for entry in entries])
    name = entries[0].name
    if name in _SINGLE:
        return _SINGLE[name](profile)
    if name == PD:
        raise bad_strategy(text, "pd is a strategy of profiles, not of single requests or of a lock")
    if is_exclusive(name):
        raise bad_strategy(text, f"{name} is not in this version; known are {_names()}")
    return Weighted([(_scorer(text, name), 1)])


def _names(of: Iterable[str] = STRATEGIES) -> str:
    return ", ".join(sorted(of))


def _scorer(text: str, name: str) -> Scorer:
    scorer = ALL_SCORERS.get(canonical(name))
    if scorer is None:
        if canonical(name) in _SINGLE:
            problem = f"{name[:60]!r} cannot be combined; what can be is {_names(ALL_SCORERS)}"
        else:
            problem = f"{name[:60]!r} is not a strategy; known are {_names()}"
        raise bad_strategy(text, problem)
    return scorer
