"""Tables of recent keys, against a dictionary that never forgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.shm.recent import RecentKeys

ENTRIES = 64


def new_table() -> RecentKeys:
    return RecentKeys(bytearray(ENTRIES * 32 + 64), 64, ENTRIES)


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 9), st.floats(0, 1e9)), max_size=200))
def test_remembers_what_was_used_last_and_invents_nothing(puts: list[tuple[int, int, float]]) -> None:
    table, known = new_table(), dict[int, tuple[int, float, float]]()
    for moment, (key, number, amount) in enumerate(puts, 1):
        table.put(key, number, amount, float(moment))
        known[key] = (number, amount, float(moment))
        assert table.get(key) == known[key]
    held = [key for key in known if table.get(key) is not None]
    assert all(table.get(key) == known[key] for key in held)
    assert len(table) == len(held) <= ENTRIES
    if len(known) <= 8:
        assert len(held) == len(known)


def test_a_full_set_loses_the_one_used_longest_ago() -> None:
    table = RecentKeys(bytearray(8 * 32), 0, 8)
    for key in range(1, 9):
        table.put(key, key, 0.0, float(key))
    table.put(1, 1, 0.0, 20.0)
    table.put(99, 99, 0.0, 21.0)
    assert table.get(2) is None
    assert [table.get(key) is not None for key in (1, 3, 8, 99)] == [True] * 4


def test_numbers_are_forgotten_together() -> None:
    table = new_table()
    for key in range(1, 30):
        table.put(key, key % 3, 0.0, 1.0)
    held = len(table)
    gone = table.forget_number(1)
    assert gone > 0
    assert len(table) == held - gone
    assert all(found is None or found[0] != 1 for found in map(table.get, range(1, 30)))


def test_range_halves_what_is_old() -> None:
    table = new_table()
    assert table.range(0.0, 10.0) == (0.0, 0.0)
    table.put(1, 0, 100.0, 0.0)
    table.put(2, 0, 30.0, 20.0)
    assert table.range(20.0, 10.0) == (25.0, 30.0)


def test_bad_tables_and_keys() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        RecentKeys(bytearray(1024), 0, 12)
    with pytest.raises(ValueError, match="too small"):
        RecentKeys(bytearray(1024), 8, 32)
    with pytest.raises(ValueError, match="no key"):
        new_table().put(0, 1, 1.0, 1.0)
    assert new_table().get(0) is None
