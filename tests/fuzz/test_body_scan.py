"""A minute of bodies that nobody would send: the native scan reads them as parsers do, or leaves them to one."""

from __future__ import annotations

import time

import pytest

from pointsman.scripts.fuzz_body import fuzz

SECONDS = 60.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_body_is_read_differently() -> None:
    seed = time.time_ns() % 1_000_000  # a failure tells it
    ends = time.monotonic() + SECONDS
    judge = fuzz(seed, lambda _: time.monotonic() >= ends)
    assert judge.certain > judge.cases / 4
