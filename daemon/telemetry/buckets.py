"""Histograms of shared memory in the form that Prometheus wants."""

from __future__ import annotations

from itertools import accumulate

from pointsman.daemon.shm import layout as at
from pointsman.daemon.telemetry.series import Histogram


def cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [str(bound) for bound in at.BUCKETS_S] + ["+Inf"]
    return list(zip(bounds, accumulate(histogram.buckets), strict=True))
