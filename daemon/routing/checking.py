"""What is wrong with strategies and parameters of a configuration file: all of it, each with its place.

`strategies.read_profile` and `build` have the last word; they stop at the first defect and know no bounds, so every
key is looked at alone before.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

import msgspec

from pointsman.config.nearest import closest
from pointsman.config.policy_names import Flaw
from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.cache_aware import CacheAwareParameters
from pointsman.daemon.routing.chain import Stage, is_exclusive, parse_strategy
from pointsman.daemon.routing.costs import ALL_SCORERS, DynamoParameters, LlmDParameters
from pointsman.daemon.routing.expected_cost import ExpectedCostParameters
from pointsman.daemon.routing.keyed import KeyedParameters
from pointsman.daemon.routing.policies import canonical
from pointsman.daemon.routing.strategies import STRATEGIES, StickyParameters, build, read_profile

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
_MOST = 2.0**53
_BOUNDS: dict[str, tuple[float, float]] = {
    "cache_threshold": (0, 1),
    "balance_rel_threshold": (0, 1e9),
    "max_tree_size": (1, 2**50),
    "factor": (1, 1e9),
    "load_factor": (1, 1e9),
    "head_chars": (1, 2**31 - 1),
    "keep": (1, 2**31 - 1),
}
"""By the parameter's name; every other number is at least 0."""

_KINDS = {"float": "a number", "int": "a whole number", "str": "a string", "bool": "a truth value"}
_KINDS |= {"object": "an object", "array": "a list", "null": "nothing"}


class FileCheck:
    """A `config.policy_names.RoutingCheck`."""

    def strategy(self, text: str) -> Flaw | None:
        if len(text) > MAX_STRATEGY or not (text.isascii() and text.isprintable()):
            return Flaw(f"a strategy is at most {MAX_STRATEGY} printable ASCII characters")
        try:
            entries = parse_strategy(text)
        except RequestError as error:
            return _flaw_of(error, text)
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
        return _fields(SECTIONS[section], value, ())

    def whole(self, routing: Mapping[str, Any]) -> Flaw | None:
        try:
            build(read_profile(routing))
        except RequestError as error:
            return Flaw(error.message)
        return None


def _flaw_of(error: RequestError, text: str) -> Flaw:
    return Flaw(error.message.removeprefix(f"incorrect routing strategy {text[:200]!r}: "))


def _exclusive(name: str) -> Flaw:
    if name == "pd":
        return Flaw("prefill/decode routing is not in this version", "use another strategy", is_later=True)
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
        return None, [Flaw(f"expected a list of stages, got {_kind(value)}")]
    if len(value) > MAX_STAGES:
        return None, [Flaw(f"has more than {MAX_STAGES} stages")]
    stages, flaws = [], list[Flaw]()
    for index, item in enumerate(value):
        stage, found = _fields(Stage, item, (index,))
        name = stage.get("scorer") if stage else None
        if isinstance(name, str) and canonical(name) not in ALL_SCORERS:
            unfit = _unfit(canonical(name), is_alone=False)
            found += [unfit._replace(path=(index, "scorer"))] if unfit else []
        stages.append(stage)
        flaws += found
    return stages, flaws


def _fields(shape: type[msgspec.Struct], value: object, path: tuple[str | int, ...]) -> tuple[Any, list[Flaw]]:
    if not isinstance(value, dict):
        return None, [Flaw(f"expected an object, got {_kind(value)}", path=path)]
    fields = {field.name: field for field in msgspec.structs.fields(shape)}
    typed, flaws = dict[str, Any](), list[Flaw]()
    for key, written in value.items():
        field = fields.get(key)
        if field is None:
            flaws.append(Flaw("unknown key", closest(str(key), fields), (*path, key)))
            continue
        found, flaw = _typed(key, written, field.type)
        typed[key] = found
        flaws += [flaw._replace(path=(*path, key))] if flaw else []
    missing = [name for name, field in fields.items() if field.required and name not in value]
    flaws += [Flaw("is required", path=(*path, name)) for name in missing]
    return typed, flaws


def _typed(name: str, value: object, kind: Any) -> tuple[Any, Flaw | None]:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value, None
        shown = repr(value)[:60] if isinstance(value, str) else _kind(value)
        expected = " or ".join(map(repr, choices))
        return None, Flaw(f"expected {expected}, got {shown}", closest(str(value), choices))
    if isinstance(value, int) and abs(value) > _MOST:
        return None, Flaw("is too large")  # and more than a float holds
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return None, Flaw(_in_words(str(error)))
    return found, _out_of_bounds(name, found)


def _out_of_bounds(name: str, value: object) -> Flaw | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    least, most = _BOUNDS.get(name, (0, inf))
    if not isfinite(value):
        return Flaw("expected a finite number")
    if value < least:
        return Flaw(f"expected at least {least:g}, got {value:g}")
    return Flaw(f"expected at most {most:g}, got {value:g}") if value > most else None


def _in_words(message: str) -> str:
    """Of msgspec's "Expected `float | null`, got `str`"."""
    found = re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`", message)
    if found is None:
        return message
    expected = " or ".join(_KINDS.get(kind, kind) for kind in found[1].split(" | ") if kind != "null")
    return f"expected {expected}, got {_KINDS.get(found[2], found[2])}"


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing" if value is None else _KINDS.get(type(value).__name__, "a value")
