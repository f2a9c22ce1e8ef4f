"""A run in slices of time. When they are too many, neighbours are put together, and slices last twice as long."""

from __future__ import annotations

from dataclasses import dataclass, field

from pointsman.daemon.bench.histogram import Histogram

MOST_SLICES = 300
COARSE_BITS = 5
"""Quantiles of a slice are off by 3 % at most."""


def _coarse() -> Histogram:
    return Histogram(COARSE_BITS)


@dataclass(slots=True)
class Slice:
    """What ended in it."""

    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    e2e: Histogram = field(default_factory=_coarse)
    ttft: Histogram = field(default_factory=_coarse)

    def absorb(self, other: Slice) -> None:
        self.succeeded += other.succeeded
        self.failed += other.failed
        self.tokens += other.tokens
        self.e2e.merge(other.e2e)
        self.ttft.merge(other.ttft)


class Timeline:
    def __init__(self, origin_ns: int, slice_ns: int) -> None:
        """`slice_ns`: of one slice in the beginning, above 0."""
        self.origin_ns = origin_ns
        self.slice_ns = slice_ns
        self.slices: list[Slice] = []

    def at(self, time_ns: int) -> Slice:
        """The slice that this time is in; what was before the origin is in the first."""
        index = max(0, (time_ns - self.origin_ns) // self.slice_ns)
        while index >= MOST_SLICES:
            self._halve()
            index = (time_ns - self.origin_ns) // self.slice_ns
        while len(self.slices) <= index:
            self.slices.append(Slice())
        return self.slices[index]

    def _halve(self) -> None:
        for left, right in zip(self.slices[::2], self.slices[1::2], strict=False):
            left.absorb(right)
        self.slices = self.slices[::2]
        self.slice_ns *= 2
