"""What pydantic found wrong, in the operator's words: dotted key, what was expected, the nearest name."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from pointsman.config.nearest import closest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]

_EXPECTED = {
    "string_type": "a string",
    "string_unicode": "a string of valid Unicode",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "mapping_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_long": "at most {max_length} characters",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entry",
}


def describe(error: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """(problem, hint) of one pydantic error."""
    kind, path, context = error["type"], error["loc"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key", closest(str(path[-1]), _keys_at(model, path[:-1]))
    if kind == "missing":
        return "is required", ""
    if kind == "invalid_key":
        return "keys must be strings", ""
    if kind == "string_too_short":
        return "must not be empty", ""
    if kind == "literal_error":
        expected = str(context["expected"])
        return f"expected {expected}, got {_shown(error)}", closest(str(error["input"]), expected.split("'")[1::2])
    if kind == "value_error":
        return str(context["error"]), ""
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind].format(**context)}, got {_shown(error)}", ""
    return error["msg"], ""


def _shown(error: ErrorDetails) -> str:
    """The offending value, short; of a key nothing but its kind."""
    value = error["input"]
    name = next((name for kinds, name in _JSON_NAMES if isinstance(value, kinds)), f"a {type(value).__name__}")
    if name in ("an object", "a list", "nothing") or _SECRET.search(str(error["loc"][-1:])):
        return name
    text = repr(value) if isinstance(value, str) else str(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return f"{name} ({text if len(text) <= 60 else text[:57] + '...'})" if name != "a string" else text[:60]


_SECRET = re.compile("key|sha256")
"""Of these keys the value is never shown: by mistake a key may stand where its hash belongs."""

_JSON_NAMES: tuple[tuple[Any, str], ...] = (
    (type(None), "nothing"),
    (bool, "a truth value"),
    ((int, float), "a number"),
    (str, "a string"),
    ((list, tuple), "a list"),
    (dict, "an object"),
)


_Model = TypeVar("_Model", bound=BaseModel)


def check(
    model: type[_Model], value: object, report: Callable[[Path, str, str], None], prefix: Path = ()
) -> _Model | None:
    """The validated model; or None after `report(path, problem, hint)` of every defect."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problem, hint = describe(detail, model)
            loc = tuple(part for part in detail["loc"] if part != "[key]")
            report((*prefix, *loc), problem, hint)
        return None


def keys_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _keys_at(model: type[BaseModel], path: Path) -> list[str]:
    at: Any = model
    for part in path:
        if _is_model(at):
            at = next((f.annotation for n, f in at.model_fields.items() if (f.alias or n) == part), None)
        else:
            at = typing.get_args(at)[-1] if isinstance(part, str) else typing.get_args(at)[0]
        at = _without_none(at)
    return keys_of(at) if _is_model(at) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation
