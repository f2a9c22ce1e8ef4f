"""What a run is judged by. The first 8 % and the last 5 % of the arrivals are left out (warm-up and drain)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log

import msgspec

from pointsman.scripts.replay.simulation import Served
from pointsman.scripts.replay.workload import prefill_s
from pointsman.scripts.simulated_engine.model import EngineLimits
from pointsman.scripts.simulated_engine.timing import StepCost

WARM_UP = 0.08
TAIL = 0.05
GOOD_TTFT_S = 2.0
GOOD_TPOT_S = 0.05
LEAST = 1e-9


class Measures(msgspec.Struct, frozen=True):
    """Times in seconds, the rest are shares; `imbalance` is the most over the mean of computed prompt tokens."""

    requests: int
    hit_rate: float
    """cached / prompt tokens, as the engines report"""
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_mean: float
    goodput: float
    """TTFT below 2 s and mean TPOT below 50 ms"""
    goodput_len: float
    """TTFT below 1 s + 2 x the prompt's own uncached prefill, same TPOT"""
    imbalance: float


def measure(served: Sequence[Served], workers: int, cost: StepCost, limits: EngineLimits) -> Measures:
    """`served` in the order of arrival, at least one."""
    count = len(served)
    kept = served[int(count * WARM_UP) : count - int(count * TAIL)] or served
    ttfts = sorted(one.ttft_s for one in kept)
    tpots = [one.tpot_s for one in kept if one.output_tokens > 1]
    computed = [0] * workers
    for one in kept:
        computed[one.worker] += one.prompt_tokens - one.cached_tokens
    fluent = [one for one in kept if one.tpot_s < GOOD_TPOT_S]
    return Measures(
        requests=len(kept),
        hit_rate=sum(one.cached_tokens for one in kept) / sum(one.prompt_tokens for one in kept),
        ttft_mean=sum(ttfts) / len(ttfts),
        ttft_p50=quantile(ttfts, 0.5),
        ttft_p90=quantile(ttfts, 0.9),
        ttft_p99=quantile(ttfts, 0.99),
        tpot_mean=sum(tpots) / len(tpots) if tpots else 0.0,
        goodput=sum(one.ttft_s < GOOD_TTFT_S for one in fluent) / len(kept),
        goodput_len=sum(one.ttft_s < 1 + 2 * prefill_s(cost, limits, one.prompt_tokens, 0) for one in fluent)
        / len(kept),
        imbalance=max(computed) * workers / sum(computed),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that `share` of the sorted values do not exceed."""
    return ordered[max(ceil(share * len(ordered)) - 1, 0)]


def geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(log(max(value, LEAST)) for value in values) / len(values))
