"""The policies that need nothing but counts (policies.py), under the contract of picking.py."""

from __future__ import annotations

from pointsman.daemon.routing.picking import CHANCE, LOAD, ONLY_ELIGIBLE, Explanation, Pick, Situation, single_column
from pointsman.daemon.routing.policies import POLICIES

_BLIND = frozenset({"random", "round_robin"})


class Counting:
    """`name`: of POLICIES."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._choose = POLICIES[name]
        self._reason = CHANCE if name in _BLIND else LOAD

    def pick(self, situation: Situation) -> Pick:
        eligible, fleet = situation.eligible, situation.fleet
        loads = [fleet.loads[worker].in_flight for worker in eligible]
        weights = [fleet.workers[worker].weight for worker in eligible]
        worker = eligible[self._choose(loads, weights, lambda: situation.turn, situation.rng)]
        return Pick(worker, self._reason if len(eligible) > 1 else ONLY_ELIGIBLE, has_index_hit=False)

    def explain(self, situation: Situation) -> Explanation:
        if self._name in _BLIND:
            return single_column(self._name, dict.fromkeys(situation.eligible, 1.0))
        fleet = situation.fleet
        weights = {worker: fleet.workers[worker].weight for worker in situation.eligible}
        loads = {worker: (fleet.loads[worker].in_flight + 1) / weight for worker, weight in weights.items()}
        return single_column(self._name, loads)
