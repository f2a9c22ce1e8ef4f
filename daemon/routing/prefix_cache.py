"""AIBrix's `prefix-cache` used alone: best match among workers that are not busier than the others, with two guards.

    max - min of the requests in flight > 8 -> only the workers at the minimum are considered
    then by match %, then by load: the first whose load is at most mean + 1 standard deviation
    none                                    -> least requests

Source: `pkg/plugins/gateway/algorithms/prefix_cache.go` (constants of the code, not of its readme). In a weighted
strategy the guards do not exist (chain.py). The index behind it is ours, not AIBrix's small table.
"""

from __future__ import annotations

from statistics import fmean, stdev

from pointsman.daemon.routing.chain import Weighted
from pointsman.daemon.routing.picking import IMBALANCE, LOAD, ONLY_ELIGIBLE, Explanation, Pick, Situation, least
from pointsman.daemon.routing.scorers import SCORERS

MAX_SPREAD = 8
DEVIATIONS = 1.0


class PrefixCache:
    def pick(self, situation: Situation) -> Pick:
        eligible, loads = situation.eligible, situation.fleet.loads
        if len(eligible) == 1:
            return Pick(eligible[0], ONLY_ELIGIBLE)
        running = {worker: loads[worker].in_flight for worker in eligible}
        least_running = min(running.values())
        is_imbalanced = max(running.values()) - least_running > MAX_SPREAD
        candidates = [w for w in eligible if running[w] == least_running] if is_imbalanced else list(eligible)
        limit = fmean(running.values()) + DEVIATIONS * stdev(running.values())
        calm = [worker for worker in candidates if running[worker] <= limit]
        best = max((situation.depths[worker] for worker in calm), default=0)
        if not best:
            worker = candidates[least([running[w] for w in candidates], situation.rng)]
            return Pick(worker, IMBALANCE if is_imbalanced else LOAD)
        holders = [worker for worker in calm if situation.depths[worker] == best]
        worker = holders[least([running[w] for w in holders], situation.rng)]
        return Pick(worker, IMBALANCE if is_imbalanced else situation.reason(worker))

    def explain(self, situation: Situation) -> Explanation:
        return Weighted([(SCORERS["prefix_cache"], 1), (SCORERS["least_request"], 1)]).explain(situation)
