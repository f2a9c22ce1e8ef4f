"""Published cost policies besides our own: one number per worker, the least wins, ties at random.

* `lmetric`: (queued + new prefill tokens) x (requests + 1) (arXiv 2603.15202).
* `dynamo`: prefill tokens in line and new, plus the contexts of all in flight (Dynamo `lib/kv-router`), in tokens;
  `temperature` > 0 draws from a softmax over the min-max normalised costs.
* `kv_headroom`: requests over free KV memory, ours for workers that decode what others prefilled.
* `llm_d`: 2 x queue + 2 x free KV + 3 x matched share, the most wins (llm-d EPP's scorers and default weights).
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import msgspec

from pointsman.daemon.routing.expected_cost import ExpectedCost
from pointsman.daemon.routing.picking import ONLY_ELIGIBLE, Column, Explanation, Pick, Situation, least, single_column
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN
from pointsman.daemon.routing.scorers import SCORERS, Scorer, Scores, booked_kv_share

CostFunction = Callable[[Situation], list[float]]
_LEAST_FREE = 0.01
_NO_ROOM = 1e6


class DynamoParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    temperature: float = 0.0
    prefill_load_scale: float = 1.0
    overlap_weight: float = 1.0


class LlmDParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    queue: float = 2.0
    kv: float = 2.0
    prefix: float = 3.0


def lmetric_costs(situation: Situation) -> list[float]:
    costs = []
    for worker in situation.eligible:
        load = situation.fleet.loads[worker]
        new = situation.prompt_tokens - situation.cached_tokens(worker)
        costs.append(float((load.queued_tokens + new) * (load.in_flight + 1)))
    return costs


def kv_headroom_costs(situation: Situation) -> list[float]:
    """For workers that decode: requests in flight with this one, over the share of KV memory that they leave free.

    The share is the engine's own word where it is recent, or that of what we have booked, whichever is less. A worker
    that has no room for the prompt goes behind all that have.
    """
    costs = []
    need = situation.prompt_tokens * CHARS_PER_TOKEN
    for worker in situation.eligible:
        load, capacity = situation.fleet.loads[worker], situation.fleet.kv_chars[worker]
        signals = load.fresh_signals(situation.now)
        used = max(booked_kv_share(situation, worker), (signals.kv_usage or 0.0) if signals is not None else 0.0)
        cost = (load.in_flight + 1) / situation.fleet.workers[worker].weight / max(1.0 - used, _LEAST_FREE)
        costs.append(cost + (_NO_ROOM if capacity and (1.0 - used) * capacity < need else 0.0))
    return costs


def dynamo_costs(situation: Situation, parameters: DynamoParameters | None = None) -> list[float]:
    parameters = parameters or DynamoParameters()
    costs = []
    for worker in situation.eligible:
        load = situation.fleet.loads[worker]
        credit = parameters.overlap_weight * situation.cached_tokens(worker)
        prefill = max(load.queued_tokens + situation.prompt_tokens - credit, 0.0)
        costs.append(parameters.prefill_load_scale * prefill + load.tokens + situation.prompt_tokens)
    return costs


class LeastCost:
    """Any cost function as a policy."""

    def __init__(self, name: str, costs: CostFunction, *, temperature: float = 0.0) -> None:
        self._name = name
        self._costs = costs
        self._temperature = temperature

    def pick(self, situation: Situation) -> Pick:
        costs = self._costs(situation)
        if self._temperature > 0:
            worker = situation.eligible[_draw(costs, self._temperature, situation)]
        else:
            worker = situation.eligible[least(costs, situation.rng)]
        return Pick(worker, situation.reason(worker))

    def explain(self, situation: Situation) -> Explanation:
        return single_column(self._name, dict(zip(situation.eligible, self._costs(situation), strict=True)))


def _draw(costs: list[float], temperature: float, situation: Situation) -> int:
    low, spread = min(costs), max(costs) - min(costs)
    weights = [exp(-((cost - low) / spread if spread else 0.0) / temperature) for cost in costs]
    point = situation.rng.random() * sum(weights)
    for position, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return position
    return len(costs) - 1


class LlmD:
    def __init__(self, parameters: LlmDParameters | None = None) -> None:
        self.parameters = parameters or LlmDParameters()

    def _columns(self, situation: Situation) -> tuple[list[float], list[float], list[float]]:
        eligible, fleet = situation.eligible, situation.fleet
        loads = [fleet.loads[worker].in_flight for worker in eligible]
        high, low = max(loads), min(loads)
        queue = [(high - load) / (high - low) if high > low else 1.0 for load in loads]
        free = [1 - booked_kv_share(situation, worker) for worker in eligible]
        return queue, free, [situation.matched_share(worker) for worker in eligible]

    def pick(self, situation: Situation) -> Pick:
        if len(situation.eligible) == 1:
            return Pick(situation.eligible[0], ONLY_ELIGIBLE)
        weights = self.parameters
        costs = [
            -(weights.queue * queue + weights.kv * free + weights.prefix * share)
            for queue, free, share in zip(*self._columns(situation), strict=True)
        ]
        worker = situation.eligible[least(costs, situation.rng)]
        return Pick(worker, situation.reason(worker))

    def explain(self, situation: Situation) -> Explanation:
        eligible, weights = situation.eligible, self.parameters
        columns = []
        totals = dict.fromkeys(eligible, 0.0)
        named = zip(
            ("queue", "kv", "prefix"),
            (weights.queue, weights.kv, weights.prefix),
            self._columns(situation),
            strict=True,
        )
        for name, weight, values in named:
            column = dict(zip(eligible, values, strict=True))
            weighted = {worker: weight * value for worker, value in column.items()}
            for worker, value in weighted.items():
                totals[worker] += value
            columns.append(Column(name, weight, dict(column), column, weighted))
        return Explanation(tuple(columns), totals, False)


def _as_scorer(name: str, costs: CostFunction) -> Scorer:
    return Scorer(name, True, lambda situation: Scores(costs(situation)))


ALL_SCORERS: dict[str, Scorer] = SCORERS | {
    "lmetric": _as_scorer("lmetric", lmetric_costs),
    "dynamo": _as_scorer("dynamo", dynamo_costs),
    "expected_cost": _as_scorer("expected_cost", ExpectedCost().costs),
}
"""AIBrix's and ours, by canonical name: what a weighted strategy or a chain may name."""
