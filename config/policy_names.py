"""Strategies as people write them, and who judges them: routing hands its check to this layer, which lies below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Flaw(NamedTuple):
    problem: str
    hint: str = ""
    path: tuple[str | int, ...] = ()
    """below what was checked; keys canonical"""


class RoutingCheck(Protocol):
    """Says everything that is wrong at once, and raises nothing."""

    def strategy(self, text: str) -> Flaw | None:
        """`text`: "prefix-cache:2,least-request", a single name, …"""
        ...

    def parameters(self, section: str, value: object) -> tuple[Any, list[Flaw]]:
        """(what was given, typed and without defaults; flaws). `section` and the keys in `value` are in snake case."""
        ...

    def whole(self, routing: Mapping[str, Any]) -> Flaw | None:
        """Of a profile whose parts are good."""
        ...


def canonical_name(text: str) -> str:
    """`-` and `_` are interchangeable; the same rule as routing's."""
    return one_line(text).replace("-", "_")


def one_line(text: str) -> str:
    """White space means nothing in a strategy, and the answer's header must stay one line."""
    return " ".join(text.split())
