"""No room comes twice, and rooms spread over data parallel ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.pd.rooms import COUNT_BITS, ROOM_BITS, Rooms


@given(
    key=st.integers(0, 2**63 - 1),
    runs=st.dictionaries(st.integers(0, 255), st.lists(st.integers(1, 50), max_size=8), max_size=6),
    start=st.integers(0, 2**40),
)
def test_rooms_of_all_shards_differ(key: int, runs: dict[int, list[int]], start: int) -> None:
    seen: list[int] = []
    for shard, counts in runs.items():
        taken = start
        for count in counts:
            seen += Rooms(key, shard).rooms(taken, count)
            taken += count
    assert len(set(seen)) == len(seen)
    assert all(0 <= room < 1 << ROOM_BITS for room in seen)


@given(st.integers(0, 2**63 - 1), st.integers(0, 255), st.integers(0, 2**40), st.sampled_from([2, 4, 8, 16]))
def test_neighbours_go_to_different_ranks(key: int, shard: int, taken: int, ranks: int) -> None:
    assert {room % ranks for room in Rooms(key, shard).rooms(taken, ranks)} == set(range(ranks))


def test_the_last_room_of_a_shard() -> None:
    assert len(Rooms(5, 3).rooms((1 << COUNT_BITS) - 1, 1)) == 1
    with pytest.raises(ValueError, match="no more rooms"):
        Rooms(5, 3).rooms((1 << COUNT_BITS) - 1, 2)
    with pytest.raises(ValueError, match="no shard"):
        Rooms(5, 256)
