"""Quantiles are within the promised error of the exact ones, and nothing is lost on the way to a file and back."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.bench.histogram import MOST, SUB_BITS, Histogram

VALUES = st.lists(st.integers(0, MOST) | st.integers(0, 300), min_size=1, max_size=200)


def filled(values: list[int], sub_bits: int = SUB_BITS) -> Histogram:
    made = Histogram(sub_bits)
    for value in values:
        made.record(value)
    return made


@given(VALUES, st.floats(0, 1), st.integers(1, 10))
def test_quantiles_are_within_the_width_of_a_bucket(values: list[int], share: float, sub_bits: int) -> None:
    exact = sorted(values)[max(ceil(share * len(values)), 1) - 1]
    assert abs(filled(values, sub_bits).quantile(share) - exact) <= exact * 2**-sub_bits


@given(VALUES)
def test_count_total_least_and_most_are_exact(values: list[int]) -> None:
    made = filled(values)
    assert (made.count, made.total, made.least, made.most) == (len(values), sum(values), min(values), max(values))
    assert made.mean == pytest.approx(sum(values) / len(values))


@given(st.integers(0, MOST) | st.integers(0, 300))
def test_a_value_is_in_the_bucket_whose_bounds_hold_it(value: int) -> None:
    made = filled([value])
    ((index, count),) = made.buckets()
    low, high = made.bounds(index)
    assert low <= value < high
    assert count == 1


@given(VALUES, VALUES)
def test_merged_is_as_if_recorded_together(some: list[int], others: list[int]) -> None:
    merged, together = filled(some), filled(some + others)
    merged.merge(filled(others))
    assert merged.buckets() == together.buckets()
    assert (merged.total, merged.least, merged.most) == (together.total, together.least, together.most)


@given(VALUES)
def test_restored_from_what_a_report_holds(values: list[int]) -> None:
    made = filled(values)
    again = Histogram.restore(made.sub_bits, made.buckets(), made.total, made.least, made.most)
    assert again.buckets() == made.buckets()
    assert again.quantile(0.9) == made.quantile(0.9)
    assert again.count == made.count


def test_what_is_out_of_range_counts_as_the_nearest() -> None:
    made = filled([-5, 1 << 60])
    assert (made.least, made.most, made.count) == (0, MOST, 2)


def test_empty() -> None:
    made = Histogram()
    assert (made.count, made.mean, made.quantile(0.5), made.least, made.most) == (0, 0.0, 0.0, 0, 0)
    filled_one = filled([7])
    filled_one.merge(made)
    assert filled_one.least == 7


@pytest.mark.parametrize("buckets", [[(1 << 20, 1)], [(-1, 1)], [(3, -1)]])
def test_impossible_buckets_are_refused(buckets: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"bucket|negative"):
        Histogram.restore(SUB_BITS, buckets, 1, 1, 1)


def test_other_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="resolution"):
        Histogram(3).merge(Histogram(4))
