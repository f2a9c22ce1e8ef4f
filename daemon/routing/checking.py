"""What is wrong with strategies and parameters of a configuration file: all of it, each with its place.

`strategies.read_profile` and `build` have the last word; they stop at the first defect and know no bounds, so every
key is looked at alone before (`config.fields`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pointsman.config.fields import check_fields, kind_of
from pointsman.config.nearest import closest
from pointsman.config.policy_names import Flaw
from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.cache_aware import CacheAwareParameters
from pointsman.daemon.routing.chain import Stage, is_exclusive, parse_strategy
from pointsman.daemon.routing.costs import ALL_SCORERS, DynamoParameters, LlmDParameters
from pointsman.daemon.routing.expected_cost import ExpectedCostParameters
from pointsman.daemon.routing.keyed import KeyedParameters
from pointsman.daemon.routing.policies import canonical
from pointsman.daemon.routing.strategies import PD, STRATEGIES, StickyParameters, build, read_profile

SECTIONS: dict[str, type[msgspec.Struct]] = {
    "sticky": StickyParameters,
    "cache_aware": CacheAwareParameters,
    "expected_cost": ExpectedCostParameters,
    "dynamo": DynamoParameters,
    "llm_d": LlmDParameters,
    "consistent_hash": KeyedParameters,
    "prefix_hash": KeyedParameters,
}
"""`chain`, a list of stages, is the one besides."""

MAX_STRATEGY = 1000
MAX_STAGES = 32
_BOUNDS: dict[str, tuple[float, float]] = {
    "cache_threshold": (0, 1),
    "balance_rel_threshold": (0, 1e9),
    "max_tree_size": (1, 2**50),
    "factor": (1, 1e9),
    "load_factor": (1, 1e9),
    "head_chars": (1, 2**31 - 1),
    "keep": (1, 2**31 - 1),
}


class FileCheck:
    """A `config.policy_names.RoutingCheck`."""

    def strategy(self, text: str) -> Flaw | None:
        if len(text) > MAX_STRATEGY or not (text.isascii() and text.isprintable()):
            return Flaw(f"a strategy is at most {MAX_STRATEGY} printable ASCII characters")
        try:
            entries = parse_strategy(text)
        except RequestError as error:
            return _flaw_of(error, text)
        if entries[0].name == PD and len(entries) == 1:
            return None
        if is_exclusive(entries[0].name):
            return _exclusive(entries[0].name)
        if len(entries) > 1:
            return next((flaw for entry in entries if (flaw := _unfit(entry.name, is_alone=False))), None)
        return _unfit(entries[0].name, is_alone=True)

    def parameters(self, section: str, value: object) -> tuple[Any, list[Flaw]]:
        if section == "sticky" and value is None:
            return None, []
        if section == "chain":
            return _chain(value)
        return check_fields(SECTIONS[section], value, bounds=_BOUNDS)

    def whole(self, routing: Mapping[str, Any]) -> Flaw | None:
        try:
            build(read_profile(routing))
        except RequestError as error:
            return Flaw(error.message)
        return None


def _flaw_of(error: RequestError, text: str) -> Flaw:
    return Flaw(error.message.removeprefix(f"incorrect routing strategy {text[:200]!r}: "))


def _exclusive(name: str) -> Flaw:
    if name == PD:
        return Flaw("'pd' stands alone", "its policies are `pd.prefill_policy` and `pd.decode_policy`")
    hint = "least_latency and expected_cost keep latency low"
    return Flaw(f"AIBrix's strategy {name[:60]!r} is not in this version", hint)


def _unfit(name: str, *, is_alone: bool) -> Flaw | None:
    names = STRATEGIES if is_alone else frozenset(ALL_SCORERS)
    if name in names:
        return None
    known = f"known: {', '.join(sorted(names))}"
    if name in STRATEGIES:
        return Flaw(f"{name!r} cannot be combined with others", known)
    return Flaw(f"unknown policy {name[:60]!r}", f"{closest(name, names)} {known}".strip())


def _chain(value: object) -> tuple[Any, list[Flaw]]:
    if not isinstance(value, list | tuple):
        return None, [Flaw(f"expected a list of stages, got {kind_of(value)}")]
    if len(value) > MAX_STAGES:
        return None, [Flaw(f"has more than {MAX_STAGES} stages")]
    stages, flaws = [], list[Flaw]()
    for index, item in enumerate(value):
        stage, found = check_fields(Stage, item, (index,), _BOUNDS)
        name = stage.get("scorer") if stage else None
        if isinstance(name, str) and canonical(name) not in ALL_SCORERS:
            unfit = _unfit(canonical(name), is_alone=False)
            found += [unfit._replace(path=(index, "scorer"))] if unfit else []
        stages.append(stage)
        flaws += found
    return stages, flaws
