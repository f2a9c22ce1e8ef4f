"""How much longer than on a quiet machine of their own things may take in tests.

A bound of time in a test is what the product promises on such a machine. Where tests usually run, others use the
processors, too, so a bound is multiplied by `leeway()`. `scripts/test-faults --strict` and `scripts/soak` set
POINTSMAN_STRICT_TIMES=1 and hold the product to the bounds themselves.
"""

from __future__ import annotations

import os
from typing import Final

IS_STRICT: Final = os.environ.get("POINTSMAN_STRICT_TIMES") == "1"
SLOW_MACHINE: Final = 4.0
"""Twice as slow, and two test files at a time."""


def crowding() -> float:
    """How many times longer things take because others use the processors, too, from 1 (nobody does) to 4."""
    return min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 4.0)


def leeway() -> float:
    """What a bound of time is multiplied by."""
    return crowding() * (1.0 if IS_STRICT else SLOW_MACHINE)
