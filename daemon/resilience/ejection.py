"""How many workers their breakers may keep out at once, and which of them stay in all the same.

Theory of operation. Breakers look at one worker each; if all engines stumble over the same load, all of them open and
nothing is left (sglang #12355). So among the workers that could take a request if there were no breakers:

    role             workers    may be kept out
    regular          1          it may: a sole worker's open breaker is told as 503 with Retry-After
    regular          n ≥ 2      max_ejection_ratio · n, rounded down
    prefill, decode  n ≥ 1      the same, but never the last one

If more breakers than that do not let pass, the least bad of them are overruled: those with the smallest share of
failures in the window, then those whose breaker opened first. A request that goes to an overruled worker carries
the ticket `UNCOUNTED`, so the breaker still closes by its probes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDING = 1e-9
"""0.7 of 10 workers are 7, not 6.999…"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take the request if there were no breakers."""

    is_kept_out: bool
    """`Breaker.permits` says no."""
    failure_share: float = 0.0
    since: float = 0.0
    """As in `BreakerView`."""


def most_kept_out(count: int, role: str, max_ejection_ratio: float) -> int:
    """How many of `count` workers of one role may be kept out."""
    is_regular = role == "regular"
    if count <= 1:
        return count if is_regular else 0
    allowed = int(max_ejection_ratio * count + _ROUNDING)
    return allowed if is_regular else min(allowed, count - 1)


def overruled(candidates: Sequence[Candidate], role: str, max_ejection_ratio: float) -> frozenset[int]:
    """Positions of those that may be picked against their breakers."""
    out = [position for position, candidate in enumerate(candidates) if candidate.is_kept_out]
    excess = len(out) - most_kept_out(len(candidates), role, max_ejection_ratio)
    if excess <= 0:
        return frozenset()
    out.sort(key=lambda position: (candidates[position].failure_share, candidates[position].since))
    return frozenset(out[:excess])
