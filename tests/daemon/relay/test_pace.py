"""When rounds begin and end, under a clock of the test's own."""

from __future__ import annotations

from random import Random

import pytest

from pointsman.daemon.relay.pace import BEGINS_AT, ENDS_BELOW, SAMPLE_EVENTS, Pace

ROUND_S = 0.001


def begins(events_per_round: float) -> bool:
    """With events at that rate, for a while."""
    pace, now = Pace(ROUND_S), 100.0
    found = False
    for _ in range(10):
        now += SAMPLE_EVENTS / events_per_round * ROUND_S
        found = pace.sample(now)
    return found


@pytest.mark.parametrize("events_per_round", [2.1, 5.0, 1000.0])
def test_rounds_begin_where_events_are_many(events_per_round: float) -> None:
    assert begins(events_per_round)


@pytest.mark.parametrize("events_per_round", [0.01, 1.0, 1.9])
def test_rounds_do_not_begin_where_events_are_few(events_per_round: float) -> None:
    assert not begins(events_per_round)


def test_the_first_sample_says_nothing() -> None:
    assert not Pace(ROUND_S).sample(100.0)


def test_without_a_round_they_never_begin() -> None:
    pace = Pace(0.0)
    assert not any(pace.sample(100.0) for _ in range(10))


def rounds_until_over(pace: Pace, found: list[int]) -> int:
    for number, streams in enumerate(found):
        if pace.round_over(streams):
            return number
    return len(found)


def test_rounds_end_when_nothing_comes() -> None:
    assert 10 < rounds_until_over(Pace(ROUND_S), [0] * 1000) < 100


def test_rounds_that_have_begun_go_on_at_the_same_rate() -> None:
    rng = Random(1)
    found = [sum(rng.random() < BEGINS_AT / 100 for _ in range(100)) for _ in range(20_000)]
    assert rounds_until_over(Pace(ROUND_S), found) == len(found)


def test_rounds_end_well_below() -> None:
    rng = Random(1)
    found = [int(rng.random() < ENDS_BELOW / 2) for _ in range(1000)]
    assert rounds_until_over(Pace(ROUND_S), found) < 200


def test_rounds_that_begin_again_forget_the_silence_before() -> None:
    pace = Pace(ROUND_S)
    assert rounds_until_over(pace, [0] * 1000) < 100
    for _ in range(2):
        pace.sample(100.0)
    assert not pace.round_over(0)
