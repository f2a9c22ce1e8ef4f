"""SGLang's `cache_aware`: affinity while the fleet is balanced, the shortest queue when it is not.

    imbalanced (max - min > abs and max > rel * min of the loads) -> least load
    balanced, matched share > threshold                           -> a holder of the longest match
    balanced, else                                                -> a miss

Source: sgl-router `policies/cache_aware.rs`. Two choices of it are known to go wrong: a miss goes to the worker with
the smallest tree whatever its load (a new worker takes everything: the "death spiral"), and of several holders
always the first is taken. They stay selectable (`miss: smallest_tree`, `holder: first`); the default of both is
`least_load`. Loads of workers that are not eligible do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from pointsman.daemon.routing.picking import (
    IMBALANCE,
    LOAD,
    ONLY_ELIGIBLE,
    PREFIX,
    Column,
    Explanation,
    Pick,
    Situation,
    least,
)


class CacheAwareParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    eviction_interval_secs: float = 120.0
    """0: trees are never cut."""
    max_tree_size: int = 2**26
    """Characters per worker."""
    miss: Literal["smallest_tree", "least_load"] = "least_load"
    holder: Literal["first", "least_load"] = "least_load"


class CacheAware:
    def __init__(self, parameters: CacheAwareParameters | None = None) -> None:
        self.parameters = parameters or CacheAwareParameters()

    def pick(self, situation: Situation) -> Pick:
        eligible = situation.eligible
        if len(eligible) == 1:
            return Pick(eligible[0], ONLY_ELIGIBLE)
        if self._is_imbalanced(situation):
            return Pick(_least_loaded(situation, eligible), IMBALANCE)
        best = max([situation.depths[worker] for worker in eligible])
        share = situation.chain.chars(best) / situation.chain.total_chars if best else 0.0
        if share > self.parameters.cache_threshold:
            holders = [worker for worker in eligible if situation.depths[worker] == best]
            first = self.parameters.holder == "first"
            return Pick(holders[0] if first else _least_loaded(situation, holders), PREFIX)
        if self.parameters.miss == "smallest_tree":
            return Pick(situation.fleet.index.smallest(eligible), LOAD)
        return Pick(_least_loaded(situation, eligible), LOAD)

    def explain(self, situation: Situation) -> Explanation:
        eligible, fleet = situation.eligible, situation.fleet
        values = {
            "load": {worker: float(fleet.loads[worker].in_flight) for worker in eligible},
            "matched_share": {worker: situation.matched_share(worker) for worker in eligible},
            "tree_chars": {worker: float(fleet.index.size(worker)) for worker in eligible},
        }
        decisive = "load"
        if not self._is_imbalanced(situation):
            if max(values["matched_share"].values()) > self.parameters.cache_threshold:
                decisive = "matched_share"
            elif self.parameters.miss == "smallest_tree":
                decisive = "tree_chars"
        columns = [
            Column(name, float(name == decisive), dict(column), column, column if name == decisive else {})
            for name, column in values.items()
        ]
        totals = values[decisive]
        is_least_best = decisive != "matched_share"
        best = min(totals.values()) if is_least_best else max(totals.values())
        tied = tuple(worker for worker, value in totals.items() if value == best)
        return Explanation(tuple(columns), totals, is_least_best, tied)

    def _is_imbalanced(self, situation: Situation) -> bool:
        loads = [situation.fleet.loads[worker].in_flight for worker in situation.eligible]
        high, low = max(loads), min(loads)
        parameters = self.parameters
        return high - low > parameters.balance_abs_threshold and high > parameters.balance_rel_threshold * low


def _least_loaded(situation: Situation, among: Sequence[int]) -> int:
    loads = situation.fleet.loads
    return among[least([loads[worker].in_flight for worker in among], situation.rng)]
