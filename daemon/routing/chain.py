"""Several scorers, one pick: AIBrix's weighted sum, and the ranked narrowing that its reviewers discussed.

The weighted sum, `least-request:40,prefix-cache:60` (AIBrix PR #2124): every scorer's values are min-max normalised
over the workers it scored, turned so that 1 is best (all equal: 1), multiplied by its weight, and summed over the sum
of weights. Values that are missing or not finite count 0. Sums closer than 1e-9 are a tie, broken at random.

Narrowing, `chain: [{scorer: prefix-cache, within: 10}, {scorer: least-request, keep: 2}, {scorer: least-latency}]`:
in order, a stage keeps the `keep` best of the remaining workers (and who equals the last of them), or those whose
value is `within` the best one's, in the scorer's own unit (percent, requests, seconds). Among those left the weighted
sum of the stages that have a weight decides; without any weight the last stage does. A stage that scores none of the
remaining workers narrows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import msgspec

from pointsman.daemon.errors import RequestError, bad_request
from pointsman.daemon.routing.picking import ONLY_ELIGIBLE, STALE, Column, Explanation, Pick, Situation
from pointsman.daemon.routing.policies import canonical
from pointsman.daemon.routing.scorers import Scorer, Scores

MAX_WEIGHT = 1_000_000
TIE = 1e-9


class Entry(msgspec.Struct, frozen=True):
    name: str
    """Canonical."""
    weight: int = 1


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    scorer: str
    keep: int | None = None
    within: float | None = None
    weight: float = 0.0


def bad_strategy(text: str, problem: str) -> RequestError:
    return bad_request(f"incorrect routing strategy {text[:200]!r}: {problem}", code="invalid_routing_strategy")


def parse_strategy(text: str) -> list[Entry]:
    """`name[:weight](,name[:weight])*` -> entries of weight above 0, in order; an exclusive name stands alone.

    Weights are whole numbers from 0 to MAX_WEIGHT, default 1. Zero-weight entries are dropped first, whatever their
    names. Raises RequestError 400. Whether the names exist is for the caller to say.
    """
    entries = []
    for part in text.split(","):
        name, *weights = (piece.strip() for piece in part.split(":"))
        if not name:
            raise bad_strategy(text, "a name is empty")
        if len(weights) > 1:
            raise bad_strategy(text, f"{name[:60]!r} has more than one weight")
        weight = _weight(text, weights[0]) if weights else 1
        if weight:
            entries.append(Entry(canonical(name), weight))
    if not entries:
        raise bad_strategy(text, "every weight is 0")
    for entry in entries:
        if is_exclusive(entry.name):
            return [Entry(entry.name)]
    return entries


def _weight(text: str, written: str) -> int:
    if not (written.isascii() and written.isdigit() and len(written) < 9) or int(written) > MAX_WEIGHT:
        raise bad_strategy(text, f"a weight is a whole number from 0 to {MAX_WEIGHT}")
    return int(written)


def is_exclusive(name: str) -> bool:
    """Such a strategy cannot be weighed against others: the first one given is used alone."""
    return name == "pd" or name.startswith("slo")


def normalised(values: Sequence[float | None], *, is_least_best: bool) -> list[float]:
    """Min-max over the finite values, 1 = best, 1 for all when they are equal, 0 where there is no finite value."""
    finite = [value for value in values if value is not None and isfinite(value)]
    if not finite:
        return [0.0] * len(values)
    low, high = min(finite), max(finite)
    out = []
    for value in values:
        if value is None or not isfinite(value):
            out.append(0.0)
        elif high == low:
            out.append(1.0)
        else:
            out.append((high - value if is_least_best else value - low) / (high - low))
    return out


def tied_best(totals: Sequence[float]) -> list[int]:
    best = max(totals)
    return [i for i, total in enumerate(totals) if best - total < TIE]


class Weighted:
    """`entries`: (scorer, weight above 0), at least one; a scorer given twice counts twice."""

    def __init__(self, entries: Sequence[tuple[Scorer, float]]) -> None:
        self._entries = tuple(entries)
        self._sum = sum(weight for _, weight in entries)

    def pick(self, situation: Situation) -> Pick:
        if len(situation.eligible) == 1:
            return Pick(situation.eligible[0], ONLY_ELIGIBLE)
        totals, is_degraded = [0.0] * len(situation.eligible), False
        for scorer, weight in self._entries:
            scores = scorer.score(situation)
            is_degraded |= scores.is_degraded
            share = weight / self._sum
            for i, value in enumerate(normalised(scores.values, is_least_best=scorer.is_least_best)):
                totals[i] += share * value
        worker = situation.eligible[_one_of(tied_best(totals), situation)]
        return Pick(worker, STALE if is_degraded else situation.reason(worker))

    def explain(self, situation: Situation) -> Explanation:
        eligible = situation.eligible
        columns = [_column(scorer, weight, scorer.score(situation), eligible) for scorer, weight in self._entries]
        totals = {worker: sum(column.weighted[worker] for column in columns) / self._sum for worker in eligible}
        tied = tied_best([totals[worker] for worker in eligible])
        return Explanation(tuple(columns), totals, False, tuple(eligible[i] for i in tied))


def _one_of(tied: Sequence[int], situation: Situation) -> int:
    return tied[0] if len(tied) == 1 else tied[int(situation.rng.random() * len(tied))]


def _column(scorer: Scorer, weight: float, scores: Scores, eligible: Sequence[int]) -> Column:
    norms = normalised(scores.values, is_least_best=scorer.is_least_best)
    return Column(
        scorer.name,
        weight,
        dict(zip(eligible, scores.values, strict=True)),
        dict(zip(eligible, norms, strict=True)),
        {worker: weight * norm for worker, norm in zip(eligible, norms, strict=True)},
    )


class Narrowing:
    """Ranked narrowing; see the module."""

    def __init__(self, stages: Sequence[tuple[Scorer, Stage]]) -> None:
        self._stages = tuple(stages)

    def pick(self, situation: Situation) -> Pick:
        if len(situation.eligible) == 1:
            return Pick(situation.eligible[0], ONLY_ELIGIBLE)
        left, _, columns, is_degraded = self._narrow(situation)
        totals = self._totals(left, columns)
        worker = left[_one_of(tied_best([totals[w] for w in left]), situation)]
        return Pick(worker, STALE if is_degraded else situation.reason(worker))

    def explain(self, situation: Situation) -> Explanation:
        left, dropped, columns, _ = self._narrow(situation)
        totals = self._totals(left, columns)
        tied = tied_best([totals[worker] for worker in left])
        return Explanation(tuple(columns), totals, False, tuple(left[i] for i in tied), dropped)

    def _narrow(self, situation: Situation) -> tuple[list[int], dict[int, str], list[Column], bool]:
        left, dropped = list(situation.eligible), dict[int, str]()
        columns, is_degraded = [], False
        for scorer, stage in self._stages:
            scores = scorer.score(situation)
            is_degraded |= scores.is_degraded
            raw = dict(zip(situation.eligible, scores.values, strict=True))
            kept = _kept(left, raw, scorer, stage)
            for worker in left:
                if worker not in kept:
                    dropped[worker] = f"{scorer.name}: {raw[worker]} is not {_rule(stage)}"
            left = [worker for worker in left if worker in kept]
            columns.append((scorer, stage.weight, raw))
        return left, dropped, [self._final_column(left, *column) for column in columns], is_degraded

    def _final_column(self, left: Sequence[int], scorer: Scorer, weight: float, raw: dict[int, float | None]) -> Column:
        """Normalised among those left: who was dropped must not change who wins."""
        norms = normalised([raw[worker] for worker in left], is_least_best=scorer.is_least_best)
        by_worker = dict(zip(left, norms, strict=True))
        return Column(scorer.name, weight, raw, by_worker, {w: weight * norm for w, norm in by_worker.items()})

    def _totals(self, left: Sequence[int], columns: Sequence[Column]) -> dict[int, float]:
        weights = sum(column.weight for column in columns)
        if not weights:
            return {worker: columns[-1].normalised[worker] for worker in left}
        return {worker: sum(column.weighted[worker] for column in columns) / weights for worker in left}


def _rule(stage: Stage) -> str:
    return f"among the best {stage.keep}" if stage.keep is not None else f"within {stage.within} of the best"


def _kept(left: Sequence[int], raw: Mapping[int, float | None], scorer: Scorer, stage: Stage) -> set[int]:
    sign = 1.0 if scorer.is_least_best else -1.0
    costs = {
        worker: sign * value for worker in left if (value := raw[worker]) is not None and isfinite(value)
    }  # the least is the best
    if not costs or (stage.keep is None and stage.within is None):
        return set(left)
    limit = sorted(costs.values())[min(stage.keep, len(costs)) - 1] if stage.keep is not None else float("inf")
    if stage.within is not None:
        limit = min(limit, min(costs.values()) + stage.within)
    return {worker for worker, cost in costs.items() if cost <= limit + TIE}
