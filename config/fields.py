"""An object of a configuration file against a msgspec struct: everything that is wrong with it, each with its place.

`msgspec.convert` stops at the first defect; here every key is looked at alone.
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

Bounds = Mapping[str, tuple[float, float]]
"""By the key's name, for numbers whose types do not bound them; every other such number is at least 0."""

_MOST = 2.0**53
_KINDS = {"float": "a number", "int": "a whole number", "str": "a string", "bool": "a truth value"}
_KINDS |= {"object": "an object", "array": "a list", "null": "nothing"}
_LIMITS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


def check_fields(
    shape: type[msgspec.Struct], value: object, path: tuple[str | int, ...] = (), bounds: Bounds | None = None
) -> tuple[Any, list[Flaw]]:
    """(what was given, typed and without defaults; flaws). `path` is where `value` stands; keys are in snake case."""
    if not isinstance(value, dict):
        return None, [Flaw(f"expected an object, got {kind_of(value)}", path=path)]
    fields = {field.name: field for field in msgspec.structs.fields(shape)}
    typed, flaws = dict[str, Any](), list[Flaw]()
    for key, written in value.items():
        field = fields.get(key)
        if field is None:
            flaws.append(Flaw("unknown key", closest(str(key), fields), (*path, key)))
            continue
        found, flaw = _typed(key, written, field.type, bounds or {})
        typed[key] = found
        flaws += [flaw._replace(path=(*path, key))] if flaw else []
    missing = [name for name, field in fields.items() if field.required and name not in value]
    flaws += [Flaw("is required", path=(*path, name)) for name in missing]
    return typed, flaws


def _typed(name: str, value: object, kind: Any, bounds: Bounds) -> tuple[Any, Flaw | None]:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value, None
        shown = repr(value)[:60] if isinstance(value, str) else kind_of(value)
        expected = " or ".join(map(repr, choices))
        return None, Flaw(f"expected {expected}, got {shown}", closest(str(value), choices))
    if isinstance(value, int) and abs(value) > _MOST:
        return None, Flaw("is too large")  # and more than a float holds
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return None, Flaw(_in_words(str(error), value))
    return found, _out_of_bounds(name, found, bounds)


def _out_of_bounds(name: str, value: object, bounds: Bounds) -> Flaw | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    least, most = bounds.get(name, (0, inf))
    if not isfinite(value):
        return Flaw("expected a finite number")
    if value < least:
        return Flaw(f"expected at least {least:g}, got {value:g}")
    return Flaw(f"expected at most {most:g}, got {value:g}") if value > most else None


def _in_words(message: str, value: object) -> str:
    """Of msgspec's "Expected `float | null`, got `str`" and "Expected `int` >= 1"."""
    if found := re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`(?: - at `\$(.*)`)?", message):
        expected = " or ".join(_KINDS.get(kind, kind) for kind in found[1].split(" | ") if kind != "null")
        return f"expected {expected}, got {_KINDS.get(found[2], found[2])}"
    if found := re.fullmatch(r"Expected `[^`]*` (>=|<=|>|<) ([-0-9.e+]+)(?: - at `\$(.*)`)?", message):
        shown = f", got {value:g}" if isinstance(value, int | float) else ""
        return f"expected {_LIMITS[found[1]]} {float(found[2]):g}{shown}"
    return message


def kind_of(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing" if value is None else _KINDS.get(type(value).__name__, "a value")
