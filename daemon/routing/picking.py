"""The contract between the router and the policies: a situation goes in, a pick comes out, nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pointsman.daemon.routing.policies import Rng
from pointsman.daemon.routing.views import ChainView, FleetView, RequestView

# Why a worker was picked; the words of metrics and explanations.
PREFIX = "prefix"
"""It holds most of the prompt among the eligible."""
SPILL = "spill"
"""Another one holds more, but is too busy."""
LOAD = "load"
"""Nobody holds more than the others."""
ONLY_ELIGIBLE = "only eligible"
STICKY = "sticky"
IMBALANCE = "imbalance"
STALE = "stale signal"
"""A policy that goes by engine metrics had none recent enough, and went by our own counts."""
NAMED = "named"
"""The request names its worker or its key."""
CHANCE = "chance"
REASONS = (PREFIX, SPILL, LOAD, ONLY_ELIGIBLE, STICKY, IMBALANCE, STALE, NAMED, CHANCE)
"""In shared memory and metrics a reason is its position here: only ever append."""


class Situation:
    """One request before its pick: what it is, who may take it, who holds how much of it. Read-only."""

    __slots__ = ("chain", "depths", "eligible", "fleet", "now", "prompt_tokens", "request", "rng", "turn")

    def __init__(
        self,
        request: RequestView,
        chain: ChainView,
        depths: Sequence[int],
        eligible: Sequence[int],
        fleet: FleetView,
        now: float,
        rng: Rng,
        turn: int = 0,
    ) -> None:
        self.request = request
        self.chain = chain
        self.depths = depths
        """How much of the prompt is held, in the chain's unit, by worker; one more for the ghost."""
        self.eligible = eligible
        """Positions in `fleet.workers`, ascending, at least one."""
        self.fleet = fleet
        self.now = now
        self.rng = rng
        self.turn = turn
        """Requests routed before this one, over all shards."""
        self.prompt_tokens = request.tokens()

    def matched_chars(self, worker: int) -> int:
        return self.chain.chars(self.depths[worker])

    def matched_share(self, worker: int) -> float:
        """0..1 of the prompt's characters."""
        total = self.chain.total_chars
        return self.matched_chars(worker) / total if total else 0.0

    def cached_tokens(self, worker: int) -> int:
        """Believed cached; engines compute at least one prompt token."""
        depth = self.depths[worker]
        if not depth:
            return 0
        chain = self.chain
        return min(int(self.prompt_tokens * chain.chars(depth) / chain.total_chars), self.prompt_tokens - 1)

    def prefill_s(self, worker: int) -> float:
        cached = self.cached_tokens(worker)
        return self.fleet.cost.seconds(self.prompt_tokens - cached, cached)

    def reason(self, worker: int) -> str:
        """Why `worker`, for policies that weigh prefix against load."""
        depths, eligible = self.depths, self.eligible
        if len(eligible) == 1:
            return ONLY_ELIGIBLE
        depth = depths[worker]
        best = max([depths[w] for w in eligible])
        if depth < best:
            return SPILL
        return PREFIX if depth > min([depths[w] for w in eligible]) else LOAD


@dataclass(frozen=True, slots=True)
class Pick:
    worker: int
    reason: str
    has_index_hit: bool = True
    """False: this policy does not look at the prefix index, so a match is luck."""


@dataclass(frozen=True, slots=True)
class Column:
    """One scorer in an explanation: values by worker position; None = this worker was not scored."""

    name: str
    weight: float
    raw: dict[int, float | None]
    normalised: dict[int, float]
    weighted: dict[int, float]


@dataclass(frozen=True, slots=True)
class Explanation:
    """`totals`: what the pick compared; `is_least_best` its polarity; `dropped` why a worker was not considered."""

    columns: tuple[Column, ...]
    totals: dict[int, float]
    is_least_best: bool
    tied: tuple[int, ...] = ()
    dropped: dict[int, str] | None = None
    matched_tokens: dict[int, int] | None = None
    matched_chars: dict[int, int] | None = None
    ttft_s: dict[int, float] | None = None
    """Predicted: line and this prefill."""

    def as_json(self, names: Sequence[str]) -> dict[str, Any]:
        """By worker name, for admin answers."""
        return {
            "scorers": [
                {
                    "name": column.name,
                    "weight": column.weight,
                    "raw": {names[w]: value for w, value in column.raw.items()},
                    "normalised": {names[w]: value for w, value in column.normalised.items()},
                    "weighted": {names[w]: value for w, value in column.weighted.items()},
                }
                for column in self.columns
            ],
            "totals": {names[w]: value for w, value in self.totals.items()},
            "better": "least" if self.is_least_best else "most",
            "tied": [names[w] for w in self.tied],
            "dropped": {names[w]: why for w, why in (self.dropped or {}).items()},
            "matched_tokens": {names[w]: count for w, count in (self.matched_tokens or {}).items()},
            "matched_chars": {names[w]: count for w, count in (self.matched_chars or {}).items()},
            "predicted_ttft_s": {names[w]: seconds for w, seconds in (self.ttft_s or {}).items()},
        }


class Policy(Protocol):
    """Stateless but for what its constructor got: everything that changes is in the fleet."""

    def pick(self, situation: Situation) -> Pick:
        """An eligible worker. Raises RequestError where the request cannot be routed by this policy."""
        ...

    def explain(self, situation: Situation) -> Explanation:
        """The numbers that `pick` would go by."""
        ...


def least(costs: Sequence[float], rng: Rng) -> int:
    """Position of the least value, ties at random: else the first worker wears out."""
    lowest = min(costs)
    if costs.count(lowest) == 1:
        return costs.index(lowest)
    tied = [i for i, cost in enumerate(costs) if cost == lowest]
    return tied[int(rng.random() * len(tied))]


def single_column(name: str, totals: dict[int, float], *, is_least_best: bool = True) -> Explanation:
    raw: dict[int, float | None] = dict(totals)
    return Explanation((Column(name, 1.0, raw, totals, totals),), totals, is_least_best)
