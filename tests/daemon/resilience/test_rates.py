"""Rates and the table of keys: against a token bucket that does it the long way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.resilience import LimitsSection
from pointsman.daemon.resilience.rates import KeyRates, Rate, RequestRate
from pointsman.daemon.resilience.table import PROBES, Table
from pointsman.daemon.resilience.words import MemoryWords, private_words

START = 1000.0


def requests(rate: float, burst: int = 0) -> RequestRate:
    return RequestRate(LimitsSection(requests_per_second=rate, requests_burst=burst))


def test_no_limit_takes_everything() -> None:
    words = private_words(1)
    assert not any(requests(0.0).take(words, 0, START) for _ in range(1000))


@pytest.mark.parametrize(("rate", "burst", "at_once"), [(5.0, 0, 5), (0.1, 0, 1), (5.0, 1, 1), (1.0, 20, 20)])
def test_so_many_at_once(rate: float, burst: int, at_once: int) -> None:
    words = private_words(1)
    taken = [requests(rate, burst).take(words, 0, START) for _ in range(at_once + 5)]
    assert [not wait for wait in taken] == [True] * at_once + [False] * 5
    assert taken[-1] == pytest.approx(1 / rate)


def test_below_one_a_second_is_one_in_so_many_seconds() -> None:
    words, rate = private_words(1), requests(0.1)
    assert rate.take(words, 0, START) == 0.0
    assert rate.take(words, 0, START + 4.0) == pytest.approx(6.0)
    assert rate.take(words, 0, START + 10.0) == 0.0


def test_a_new_rate_is_in_force_at_once() -> None:
    words = private_words(1)
    assert not any(requests(10.0).take(words, 0, START) for _ in range(10))
    assert requests(10.0).take(words, 0, START)
    assert requests(10.0, burst=30).take(words, 0, START) == 0.0


@given(
    per_s=st.floats(0.1, 100),
    burst=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 80)), max_size=60),
)
def test_it_is_a_token_bucket(per_s: float, burst: int, steps: list[tuple[float, int]]) -> None:
    rate = Rate(per_s, burst)
    paid_at, tokens, now = 0.0, float(burst), START
    for step, cost in steps:
        now += step
        tokens = min(tokens + step * per_s, burst)
        wait = rate.wait_s(paid_at, now, cost)
        missing = min(cost, burst) - tokens
        if abs(missing) < 1e-5:
            continue  # rounding decides
        assert wait == pytest.approx(max(missing, 0.0) / per_s, abs=1e-6)
        if not wait:
            paid_at = rate.take(paid_at, now, cost)
            tokens -= cost


def test_more_than_the_burst_passes_when_the_bucket_is_full_and_is_paid_for() -> None:
    rate = Rate(10.0, 100.0)
    paid_at = rate.take(0.0, START, 1000.0)
    assert rate.wait_s(paid_at, START, 1.0) == pytest.approx(90.1)
    assert rate.wait_s(paid_at, START + 91.0, 1.0) == 0.0
    assert rate.wait_s(paid_at, START + 91.0, 1000.0) == pytest.approx(9.0)


# --- keys


def keyed(rows: int = 64) -> tuple[KeyRates, MemoryWords]:
    table = Table(2, rows)
    return KeyRates(table), private_words(2 + table.words)


BOTH = LimitsSection(key_requests_per_minute=3.0, key_tokens_per_minute=600.0)


def test_each_key_has_its_own_rates() -> None:
    rates, words = keyed()
    assert [not rates.take(words, 7, BOTH, START, 1.0) for _ in range(4)] == [True, True, True, False]
    assert rates.take(words, 8, BOTH, START, 1.0) == 0.0
    assert rates.take(words, 7, BOTH, START, 1.0) == pytest.approx(20.0)


def test_nothing_is_taken_from_one_rate_if_the_other_refuses() -> None:
    rates, words = keyed()
    assert rates.take(words, 7, BOTH, START, 600.0) == 0.0
    for _ in range(20):
        assert rates.take(words, 7, BOTH, START, 10.0) == pytest.approx(1.0)
    assert rates.take(words, 7, BOTH, START + 1.0, 10.0) == 0.0
    assert rates.take(words, 7, BOTH, START + 2.0, 10.0) == 0.0


def test_tokens_are_corrected_when_they_are_known() -> None:
    rates, words = keyed()
    limits = LimitsSection(key_tokens_per_minute=600.0)
    assert rates.take(words, 7, limits, START, 100.0) == 0.0
    rates.correct(words, 7, limits, START, 800.0)  # 900 in all: 300 of debt
    assert rates.take(words, 7, limits, START, 10.0) == pytest.approx(31.0)
    rates.correct(words, 7, limits, START, -800.0)
    assert rates.take(words, 7, limits, START, 500.0) == 0.0
    rates.correct(words, 99, limits, START, 800.0)
    assert rates.take(words, 99, limits, START, 600.0) == 0.0


def test_giving_back_more_than_was_taken_fills_the_bucket_and_no_more() -> None:
    rates, words = keyed()
    limits = LimitsSection(key_tokens_per_minute=600.0)
    rates.take(words, 7, limits, START, 1.0)
    rates.correct(words, 7, limits, START, -1e9)
    assert rates.take(words, 7, limits, START, 600.0) == 0.0
    assert rates.take(words, 7, limits, START, 60.0) == pytest.approx(6.0)


def test_without_limits_no_row_is_taken() -> None:
    rates, words = keyed()
    assert rates.take(words, 7, LimitsSection(), START, 1e9) == 0.0
    assert rates.table.find(words, 7) is None


# --- the table


def test_a_key_of_zero_is_a_key_and_rows_are_a_power_of_two() -> None:
    table = Table(0, 8)
    words = private_words(table.words)
    assert table.find(words, 0) is None
    assert table.find(words, table.claim(words, 0, lambda _: 0.0)) is None
    assert table.find(words, 0) is not None
    for rows in (0, 4, 12):
        with pytest.raises(ValueError, match="power of two"):
            Table(0, rows)


def test_a_full_table_forgets_the_row_that_is_worth_least_and_leaves_nothing_of_it() -> None:
    table = Table(0, PROBES)
    words = private_words(table.words)
    for key in range(1, PROBES + 1):
        words.set_real(table.claim(words, key, words.get_real), float(abs(key - 4)))
    row = table.claim(words, 100, words.get_real)
    assert words.get_real(row) == 0.0
    assert [key for key in range(1, PROBES + 1) if table.find(words, key) is None] == [4]


@given(keys=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=80))
def test_the_newest_key_is_always_found_and_no_key_has_two_rows(keys: list[int]) -> None:
    table = Table(3, 16)
    words = private_words(3 + table.words + 1)
    for key in keys:
        row = table.claim(words, key, words.get_real)
        words.set_real(row, words.get_real(row) + 1.0)
        assert table.find(words, key) == row
    held = [words.get_int(3 + row * 4) for row in range(16)]
    assert len([key for key in held if key]) == len({key for key in held if key})
    assert [words.get_int(index) for index in (0, 1, 2, 3 + table.words)] == [0] * 4
