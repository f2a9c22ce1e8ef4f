"""The retry budget: bounded over any schedule, shared, and not starved when it is quiet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.resilience import RetrySection
from pointsman.daemon.resilience import budget as at
from pointsman.daemon.resilience.budget import WINDOW_S, WORDS, RetryBudget
from pointsman.daemon.resilience.words import MemoryWords, private_words

START = 1000.0


def budget(ratio: float = 0.2, floor: float = 10.0) -> RetryBudget:
    return RetryBudget(RetrySection(budget_ratio=ratio, budget_min_per_s=floor))


def withdraw_all(machine: RetryBudget, words: MemoryWords, now: float) -> int:
    taken = 0
    while machine.withdraw(words, now):
        taken += 1
    return taken


def test_zeroed_words_are_a_full_reserve_and_no_more() -> None:
    assert withdraw_all(budget(), private_words(WORDS), START) == 10 * WINDOW_S


@pytest.mark.parametrize(("requests", "retries"), [(0, 0), (4, 0), (5, 1), (9, 1), (10, 2), (1000, 200)])
def test_each_request_deposits_the_ratio(requests: int, retries: int) -> None:
    machine, words = budget(floor=0.0), private_words(WORDS)
    for _ in range(requests):
        machine.deposit(words, START)
    assert withdraw_all(machine, words, START) == retries


def test_the_floor_comes_back_with_time_and_is_capped() -> None:
    machine, words = budget(ratio=0.0), private_words(WORDS)
    withdraw_all(machine, words, START)
    assert withdraw_all(machine, words, START + 0.5) == 5
    assert withdraw_all(machine, words, START + 1e6) == 100


def test_what_is_not_used_fades() -> None:
    machine, words = budget(floor=0.0), private_words(WORDS)
    for _ in range(1000):
        machine.deposit(words, START)
    assert machine.balance(words, START + WINDOW_S) == pytest.approx(200 / 2.71828, rel=1e-3)


def test_nothing_is_allowed_with_neither_ratio_nor_floor() -> None:
    machine, words = budget(0.0, 0.0), private_words(WORDS)
    machine.deposit(words, START)
    assert not machine.withdraw(words, START)


def test_a_lower_floor_holds_at_once() -> None:
    words = private_words(WORDS)
    for _ in range(50):
        assert budget(ratio=0.0, floor=10.0).withdraw(words, START)
    assert not budget(ratio=0.0, floor=1.0).withdraw(words, START)
    assert budget(ratio=0.0, floor=1.0).withdraw(words, START + 60.0)


def test_a_clock_read_before_the_mutex_was_had_makes_no_budget() -> None:
    machine, words = budget(), private_words(WORDS)
    withdraw_all(machine, words, START)
    assert not machine.withdraw(words, START - 5.0)
    assert not machine.withdraw(words, START)
    assert words.get_real(at.B_AT) == START


@given(
    ratio=st.floats(0, 2),
    floor=st.floats(0, 50),
    schedule=st.lists(st.tuples(st.floats(-0.01, 20), st.integers(0, 60), st.integers(0, 300)), max_size=20),
)
def test_retries_never_exceed_ratio_and_floor_over_any_schedule(
    ratio: float, floor: float, schedule: list[tuple[float, int, int]]
) -> None:
    machine, words = budget(ratio, floor), private_words(WORDS)
    now = latest = START
    requests = retries = 0
    for step, arriving, wanted in schedule:
        now += step
        latest = max(latest, now)
        for _ in range(arriving):
            machine.deposit(words, now)
        requests += arriving
        retries += sum(machine.withdraw(words, now) for _ in range(wanted))
        assert machine.balance(words, now) >= 0.0
        assert retries <= ratio * requests + floor * (latest - START) + floor * WINDOW_S + 1e-6


@given(rate=st.integers(50, 400), failing=st.floats(0.0, 0.15))
def test_a_failure_rate_below_the_ratio_is_hidden_for_ever(rate: int, failing: float) -> None:
    machine, words = budget(floor=0.0), private_words(WORDS)
    owed = 0.0
    for turn in range(2000):
        now = START + turn / rate
        machine.deposit(words, now)
        owed += failing
        if owed >= 1.0 and turn > 20:
            owed -= 1.0
            assert machine.withdraw(words, now)
