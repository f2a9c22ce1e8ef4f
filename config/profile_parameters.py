"""Parameters of policies in a profile: found at either nesting and in any spelling, handed to routing's check.

`cache_aware`, `cache-aware` and `cacheAware` are the same section, beside `routingStrategy` or under `routingConfig`;
the same holds for the keys inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pointsman.config.documents import Findings
from pointsman.config.policy_names import RoutingCheck
from pointsman.config.positions import Path, dotted

SECTIONS = ("chain", "sticky", "cache_aware", "expected_cost", "dynamo", "llm_d", "consistent_hash", "prefix_hash")
OF_THE_TREE = ("eviction_interval_secs", "max_tree_size")
"""Published parameters of `cache_aware`; here one tree serves all profiles."""

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def snake_case(key: str) -> str:
    return _HUMP.sub("_", key).replace("-", "_").lower()


class Respelled:
    """A value with the keys of its objects in snake case, and the way back to where each was written."""

    def __init__(self, value: object, path: Path, findings: Findings) -> None:
        self._findings = findings
        self._places: dict[Path, Path] = {(): path}
        self.value = self._respell(value, (), path, depth=2)

    def report(self, path: Path, problem: str, hint: str = "") -> None:
        """`path` is below the value, in snake case; what was never written is placed where it belongs."""
        self._findings.report(self.place(path), problem, hint)

    def place(self, path: Path) -> Path:
        known = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in self._places)
        return (*self._places[known], *path[len(known) :])

    def _respell(self, value: object, path: Path, written: Path, depth: int) -> object:
        if not depth:
            return value
        if isinstance(value, list):
            return [self._member(item, (*path, i), (*written, i), depth) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        found: dict[str, object] = {}
        for key, item in value.items():
            name, place = snake_case(str(key)), (*written, key)
            if name in found:
                first = dotted(self._places[(*path, name)])
                self._findings.report(place, "is given twice", f"also as {first}")
                continue
            found[name] = self._member(item, (*path, name), place, depth)
        return found

    def _member(self, item: object, path: Path, written: Path, depth: int) -> object:
        self._places[path] = written
        return self._respell(item, path, written, depth - 1)


Parameters = dict[str, Respelled]


def split(profile: object, path: Path, findings: Findings) -> tuple[object, Parameters]:
    """(the profile without its parameter sections, the sections by canonical name)"""
    if not isinstance(profile, dict):
        return profile, {}
    written: dict[str, tuple[Path, object]] = {}
    rest = _take(profile, path, written, findings)
    nested = rest.get("routingConfig")
    if isinstance(nested, dict):
        rest["routingConfig"] = _take(nested, (*path, "routingConfig"), written, findings)
    return rest, {name: Respelled(value, place, findings) for name, (place, value) in written.items()}


def _take(
    mapping: Mapping[str, object], path: Path, written: dict[str, tuple[Path, object]], findings: Findings
) -> dict[str, Any]:
    rest: dict[str, Any] = {}
    for key, value in mapping.items():
        name, place = snake_case(key), (*path, key)
        if name not in SECTIONS:
            rest[key] = value
        elif name in written:
            findings.report(place, "is given twice", f"also as {dotted(written[name][0])}")
        else:
            written[name] = (place, value)
    return rest


def compile_parameters(sections: Parameters, check: RoutingCheck) -> dict[str, Any]:
    """What routing takes; flaws are reported."""
    routing: dict[str, Any] = {}
    for name, section in sections.items():
        value, flaws = check.parameters(name, section.value)
        for flaw in flaws:
            section.report(flaw.path, flaw.problem, flaw.hint)
        if value is not None and not flaws:
            routing[name] = value
    return routing


def warnings(sections: Parameters) -> list[str]:
    tree = sections.get("cache_aware")
    if tree is None or not isinstance(tree.value, dict):
        return []
    return [
        f"{dotted(tree.place((key,)))}: without effect: one tree for all profiles; set it under shared"
        for key in OF_THE_TREE
        if key in tree.value
    ]
