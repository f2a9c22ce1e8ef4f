"""The default policy: the worker with the least expected cost in seconds.

    cost(w) = wait + memory wait + kappa * pinned / capacity + (1 + theta + gamma * decoding) * prefill

`wait` is the predicted prefill time in the worker's line, `prefill` that of the part of this prompt that it is not
believed to hold. `theta` charges for recomputation what it takes from later requests: it grows with the share of
prompts that were cached lately and are no more (a thrashing cache makes recomputation dearer). `gamma` counts what a
prefill does to sequences that are decoding; the memory wait is the time until enough KV memory is free.

Reads no engine metric but the KV capacity, so nothing of it gets stale. Constants: a flat optimum over traces with and
without sharing; nothing here needs tuning by users.
"""

from __future__ import annotations

import msgspec

from pointsman.daemon.routing.picking import Column, Explanation, Pick, Situation, least
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN

_LOST_WEIGHT = 0.005
_MOST_STAYS = 4.0


class ExpectedCostParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    theta: float = 0.3
    theta_gain: float = 20.0
    """theta grows by this times the share of prompt blocks lost from all caches."""
    gamma: float = 0.05
    kappa_s: float = 0.2


class ExpectedCost:
    def __init__(self, parameters: ExpectedCostParameters | None = None) -> None:
        self.parameters = parameters or ExpectedCostParameters()

    def costs(self, situation: Situation) -> list[float]:
        """Seconds, by eligible worker."""
        return [sum(terms) for terms in self._terms(situation)]

    def pick(self, situation: Situation) -> Pick:
        worker = situation.eligible[least(self.costs(situation), situation.rng)]
        return Pick(worker, situation.reason(worker))

    def explain(self, situation: Situation) -> Explanation:
        eligible = situation.eligible
        rows = self._terms(situation)
        columns = []
        for number, name in enumerate(("wait_s", "memory_s", "pinned_s", "prefill_s")):
            values = {worker: row[number] for worker, row in zip(eligible, rows, strict=True)}
            columns.append(Column(name, 1.0, dict(values), values, values))
        totals = {worker: sum(row) for worker, row in zip(eligible, rows, strict=True)}
        lowest = min(totals.values())
        return Explanation(tuple(columns), totals, True, tuple(w for w, cost in totals.items() if cost == lowest))

    def _terms(self, situation: Situation) -> list[tuple[float, float, float, float]]:
        """(wait, memory wait, price of pinned memory, charged prefill) in seconds, by eligible worker."""
        fleet, now, parameters = situation.fleet, situation.now, self.parameters
        theta = 1 + parameters.theta + parameters.theta_gain * lost_with(situation)
        need = (situation.prompt_tokens + fleet.output_mean.value) * CHARS_PER_TOKEN
        rows = []
        for worker in situation.eligible:
            load = fleet.loads[worker]
            capacity = fleet.kv_chars[worker]
            memory = price = 0.0
            if capacity:
                pinned = fleet.index.pinned(worker) + load.reserved_chars
                price = parameters.kappa_s * pinned / capacity
                if pinned and pinned + need > capacity:
                    memory = fleet.stay.value * min((pinned + need - capacity) / pinned, _MOST_STAYS)
            charge = (theta + parameters.gamma * load.decoding) * situation.prefill_s(worker)
            rows.append((load.wait_s(now), memory, price, charge))
        return rows


def lost_with(situation: Situation) -> float:
    """`fleet.lost` after this request: the smoothed share of prompt blocks seen lately that no worker holds."""
    fleet, chain, depths = situation.fleet, situation.chain, situation.depths
    if not chain.total_chars:
        return fleet.lost
    gone = max(depths[-1] - max(depths[:-1]), 0)
    return fleet.lost + _LOST_WEIGHT * (chain.share(gone) - fleet.lost)
