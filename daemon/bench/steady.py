"""Was the load in a steady state? Whether a figure of equal slices of time drifts, or jumps, while it should not.

A drift is a Theil-Sen slope (the median of all pairwise slopes, which outliers do not move) that adds up to more than
MOST_DRIFT of the median over the run, and that a Mann-Kendall test would see by chance in less than one of twenty
steady runs. A coefficient of variation above MOST_VARIATION says that slices have little in common. References: Sen
1968; Mann 1945.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pvariance

LEAST_SLICES = 8
MOST_DRIFT = 0.10
MOST_VARIATION = 0.35
CRITICAL_Z = 1.96


@dataclass(slots=True, frozen=True)
class Steadiness:
    """`is_steady` None: too few slices to tell. `drift`: from begin to end, of the median; `variation`: of the mean."""

    is_steady: bool | None
    drift: float = 0.0
    variation: float = 0.0
    reason: str = ""


def judge_steadiness(name: str, values: Sequence[float], *, are_counts: bool = False) -> Steadiness:
    """`values`: one per slice, in order of time; those of slices that are not whole are the caller's to leave out.

    `are_counts`: of events that come by chance, which vary by the square root of their number without any cause.
    """
    count = len(values)
    if count < LEAST_SLICES:
        return Steadiness(None, reason=f"{name}: too short to tell ({count} slices of at least {LEAST_SLICES})")
    middle, mean = median(values), fmean(values)
    if middle <= 0 or mean <= 0:
        return Steadiness(False, reason=f"{name}: nothing in half of the time")
    slopes = [(later - earlier) / (j - i) for i, earlier in enumerate(values) for j, later in _behind(values, i)]
    drift = median(slopes) * (count - 1) / middle
    variance = pvariance(values) - (mean if are_counts else 0.0)
    variation = math.sqrt(max(variance, 0.0)) / mean
    if abs(drift) > MOST_DRIFT and abs(_mann_kendall(values)) > CRITICAL_Z:
        direction = "rises" if drift > 0 else "falls"
        return Steadiness(False, drift, variation, f"{name} {direction} by {abs(drift):.0%} over the run")
    if variation > MOST_VARIATION:
        return Steadiness(False, drift, variation, f"{name} varies by {variation:.0%} from slice to slice")
    return Steadiness(True, drift, variation)


def _behind(values: Sequence[float], index: int) -> list[tuple[int, float]]:
    return list(enumerate(values[index + 1 :], index + 1))


def _mann_kendall(values: Sequence[float]) -> float:
    """The test's Z: 0 without a trend, normally distributed by chance."""
    count = len(values)
    sum_of_signs = sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :])
    if sum_of_signs == 0:
        return 0.0
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return (sum_of_signs - math.copysign(1, sum_of_signs)) / deviation
