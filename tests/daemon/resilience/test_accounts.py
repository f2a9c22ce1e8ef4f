"""Attained service: it fades, it is shared, and no account goes below zero."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.resilience.accounts import Accounts
from pointsman.daemon.resilience.words import MemoryWords, private_words

START = 1000.0


def accounts(rows: int = 64) -> tuple[Accounts, MemoryWords]:
    made = Accounts(first=0, rows=rows, half_life_s=60.0)
    return made, private_words(made.words)


def test_nobody_has_been_served_at_first() -> None:
    ledger, words = accounts()
    assert ledger.served(words, 1, START) == ledger.share(words, 1, START) == 0.0


def test_shares_are_parts_of_all_that_was_served() -> None:
    ledger, words = accounts()
    ledger.charge(words, 1, START, 300.0)
    ledger.charge(words, 2, START, 100.0)
    assert ledger.share(words, 1, START) == 0.75
    assert ledger.share(words, 2, START + 500.0) == pytest.approx(0.25)
    assert ledger.share(words, 3, START) == 0.0


def test_half_of_it_is_forgotten_in_a_half_life() -> None:
    ledger, words = accounts()
    ledger.charge(words, 1, START, 800.0)
    assert ledger.served(words, 1, START + 60.0) == 400.0
    ledger.charge(words, 1, START + 60.0, 100.0)
    assert ledger.served(words, 1, START + 120.0) == 250.0


def test_an_estimate_that_is_taken_back_late_does_not_leave_a_debt() -> None:
    ledger, words = accounts()
    ledger.charge(words, 1, START, 100.0)
    ledger.charge(words, 1, START + 60.0, -100.0)
    assert ledger.served(words, 1, START + 60.0) == 0.0
    ledger.charge(words, 1, START + 60.0, 10.0)
    assert ledger.share(words, 1, START + 60.0) == 1.0


@given(
    events=st.lists(st.tuples(st.integers(0, 40), st.floats(-0.1, 500), st.floats(-1e6, 1e6)), max_size=100),
)
def test_service_is_never_negative_and_shares_are_shares(events: list[tuple[int, float, float]]) -> None:
    ledger, words = accounts(rows=16)
    now = START
    for user, step, tokens in events:
        now += step
        ledger.charge(words, user, now, tokens)
        for someone in range(41):
            assert ledger.served(words, someone, now) >= 0.0
            assert 0.0 <= ledger.share(words, someone, now) <= 1.0


def test_the_heavy_are_remembered_however_many_light_ones_come() -> None:
    ledger, words = accounts(rows=16)
    ledger.charge(words, 5, START, 1e6)
    for user in range(100, 5000):
        ledger.charge(words, user, START, 10.0)
    assert ledger.share(words, 5, START) > 0.9
