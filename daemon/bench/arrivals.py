"""When requests of an open loop are due, in seconds from the begin of the load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from pointsman.daemon.bench.dialects import Ask

Pattern = Literal["poisson", "constant"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

Timed = Iterator[tuple[float, int, Ask]]
"""(seconds from the begin, rising; number of the request; request)"""


@dataclass(slots=True, frozen=True)
class Follower:
    """A request that comes `delay_s` after another one has ended."""

    number: int
    ask: Ask
    delay_s: float


def arrivals(pattern: Pattern, per_s: float, random: Random) -> Iterator[float]:
    """Without end; `per_s` on average, above 0."""
    return _poisson(per_s, random) if pattern == "poisson" else _constant(per_s)


def _poisson(per_s: float, random: Random) -> Iterator[float]:
    now = 0.0
    while True:
        now += random.expovariate(per_s)
        yield now


def _constant(per_s: float) -> Iterator[float]:
    number = 0
    while True:
        yield number / per_s  # a sum of steps would drift
        number += 1
