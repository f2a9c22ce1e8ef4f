"""The policies that need nothing but counts: which of the eligible workers takes the next request.

A policy sees positions in a pool (declaration order), the requests in flight over all shards and the weights; it
returns a position. It holds no state of its own: the only state, the round-robin cursor, is shared by all shards and
comes as an argument, and so does the random number generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Rng(Protocol):
    def random(self) -> float: ...


class Choice(Protocol):
    """`loads[i]` is -1 where position i is not eligible; at least one is. Returns an eligible position."""

    def __call__(
        self, loads: Sequence[int], weights: Sequence[float], next_cursor: Callable[[], int], rng: Rng
    ) -> int: ...


def _eligible(loads: Sequence[int]) -> list[int]:
    return [i for i, load in enumerate(loads) if load >= 0]


def _draw(positions: Sequence[int], weights: Sequence[float], rng: Rng) -> int:
    """One of `positions`, with probability proportional to its weight."""
    point = rng.random() * sum(weights[i] for i in positions)
    for i in positions:
        point -= weights[i]
        if point < 0:
            return i
    return positions[-1]


def round_robin(loads: Sequence[int], weights: Sequence[float], next_cursor: Callable[[], int], rng: Rng) -> int:
    """Declaration order over the eligible ones; unequal weights by smooth interleaving (as nginx does)."""
    positions = _eligible(loads)
    turn = next_cursor()
    if all(weights[i] == weights[positions[0]] for i in positions):
        return positions[turn % len(positions)]
    schedule = smooth_schedule(tuple(weights[i] for i in positions))
    return positions[schedule[turn % len(schedule)]]


MAX_SCHEDULE = 1024
_schedules: dict[tuple[float, ...], tuple[int, ...]] = {}


def smooth_schedule(weights: tuple[float, ...]) -> tuple[int, ...]:
    """One period of smooth weighted round robin: index i appears in proportion to its weight, evenly spread.

    Weights are scaled to whole numbers with a period of at most about MAX_SCHEDULE (each at least 1).
    """
    schedule = _schedules.get(weights)
    if schedule is None:
        if len(_schedules) > 64:  # health flaps make new subsets; a handful is live at any time
            _schedules.clear()
        schedule = _schedules[weights] = _build_schedule(weights)
    return schedule


def _build_schedule(weights: tuple[float, ...]) -> tuple[int, ...]:
    smallest = min(weights)
    ratios = [weight / smallest for weight in weights]
    if sum(ratios) > MAX_SCHEDULE:
        scale = MAX_SCHEDULE / sum(ratios)
    elif all(ratio == int(ratio) for ratio in ratios):
        scale = 1.0
    else:
        scale = max(1.0, 128 / sum(ratios))
    shares = [max(1, round(ratio * scale)) for ratio in ratios]
    period = sum(shares)
    current = [0] * len(shares)
    out = []
    for _ in range(period):
        for i, share in enumerate(shares):
            current[i] += share
        best = max(range(len(shares)), key=current.__getitem__)
        current[best] -= period
        out.append(best)
    return tuple(out)


def random(loads: Sequence[int], weights: Sequence[float], next_cursor: Callable[[], int], rng: Rng) -> int:
    return _draw(_eligible(loads), weights, rng)


def least_request(loads: Sequence[int], weights: Sequence[float], next_cursor: Callable[[], int], rng: Rng) -> int:
    """Fewest requests in flight after this one, per weight; ties at random, else the first worker wears out."""
    best: list[int] = []
    lowest = 0.0
    for i, load in enumerate(loads):
        if load < 0:
            continue
        cost = (load + 1) / weights[i]
        if not best or cost < lowest:
            best, lowest = [i], cost
        elif cost == lowest:
            best.append(i)
    return best[0] if len(best) == 1 else best[int(rng.random() * len(best))]


def power_of_two(loads: Sequence[int], weights: Sequence[float], next_cursor: Callable[[], int], rng: Rng) -> int:
    """Two different workers drawn by weight; the one with fewer requests in flight per weight."""
    positions = _eligible(loads)
    first = _draw(positions, weights, rng)
    if len(positions) == 1:
        return first
    second = _draw([i for i in positions if i != first], weights, rng)
    return second if (loads[second] + 1) / weights[second] < (loads[first] + 1) / weights[first] else first


POLICIES: dict[str, Choice] = {
    "round_robin": round_robin,
    "random": random,
    "least_request": least_request,
    "power_of_two": power_of_two,
}
"""By canonical name; see `canonical`."""


def canonical(name: str) -> str:
    """`-` and `_` are interchangeable in policy names."""
    return name.strip().replace("-", "_")
