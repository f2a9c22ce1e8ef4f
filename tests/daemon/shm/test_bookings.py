"""The shared booking table against the plain-Python one, and what is left of it when somebody dies."""

from __future__ import annotations

import mmap
import os
import signal
from array import array
from math import inf, nan
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.routing.fleet import Booking, Fleet, Worker
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN, Chain
from pointsman.daemon.shm.bookings import NONE, Bookings, size_bytes

WORKERS, SHARDS, PER_SHARD = 3, 2, 8
EMPTY = Chain((), 512, 0)


def new_table(per_shard: int = PER_SHARD) -> Bookings:
    memory = mmap.mmap(-1, size_bytes(SHARDS, WORKERS, per_shard))
    table = Bookings(memory, SHARDS, WORKERS, per_shard)
    table.create()
    return table


class Step(NamedTuple):
    what: str
    which: int
    worker: int
    new: int
    context: int
    gap_s: float
    output: int | None
    is_blind: bool


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(["book", "book", "first", "finish"]),
        st.integers(0, 99),
        st.integers(0, WORKERS - 1),
        st.integers(1, 60_000),
        st.integers(0, 60_000),
        st.floats(0, 3, allow_nan=False),
        st.one_of(st.none(), st.integers(0, 4000)),
        st.booleans(),
    ),
    max_size=60,
)


def same(table: Bookings, fleet: Fleet, now: float) -> None:
    for worker in range(WORKERS):
        load = fleet.loads[worker]
        assert table.wait_s(worker, now) == pytest.approx(load.wait_s(now), abs=1e-9)
        assert table.decoding(worker) == load.decoding
        assert table.in_flight(worker) == load.in_flight
        assert table.tokens(worker) == load.tokens
        assert table.queued_tokens(worker) == load.queued_tokens
        assert table.processed(worker) == load.processed
        assert table.served(worker, now) == pytest.approx(load.served(now))
        assert table.busy(worker, now) == pytest.approx(load.busy(now))
        assert table.tpot_s(worker) == pytest.approx(load.tpot.value)
    assert table.seconds(1000, 2000) == pytest.approx(fleet.cost.seconds(1000, 2000))
    assert table.output_mean == pytest.approx(fleet.output_mean.value)
    assert table.stay_s == pytest.approx(fleet.stay.value)


@given(steps)
def test_equals_the_plain_one(script: list[Step]) -> None:
    table = new_table(per_shard=64)
    fleet = Fleet([Worker(f"w{i}") for i in range(WORKERS)], [1 << 30] * WORKERS, 0)
    live: list[tuple[int, Booking]] = []
    now = 100.0
    for step in script:
        now += step.gap_s
        for worker in range(WORKERS):
            table.ripen(worker, now)
            fleet.ripen(worker, now)
        if step.what == "book":
            blind, size = step.is_blind, step.new + step.context
            number = table.book(step.which % SHARDS, step.worker, now, step.new, step.context, 0, blind)
            live.append((number, fleet.book(step.worker, EMPTY, size, step.context, now, is_blind=blind)))
        elif live:
            number, booking = live[step.which % len(live)]
            if step.what == "first":
                table.first_token(number, now)
                fleet.first_token(booking, now)
            else:
                live.remove((number, booking))
                table.finish(number, now, NONE if step.output is None else step.output)
                fleet.finish(booking, now, step.output)
        same(table, fleet, now)


@given(steps)
def test_rebuilding_changes_nothing(script: list[Step]) -> None:
    table = new_table()
    live: list[int] = []
    now = 0.0
    for step in script:
        now += step.gap_s
        if step.what == "book":
            number = table.book(step.which % SHARDS, step.worker, now, step.new, step.context, step.new)
            live += [number] if number != NONE else []
        elif live and step.what == "first":
            table.first_token(live[step.which % len(live)], now)
        elif live:
            table.finish(live.pop(step.which % len(live)), now)
    before = [_row(table, worker) for worker in range(WORKERS)]
    table.rebuild(now)
    for worker in range(WORKERS):
        assert _row(table, worker) == before[worker]
    for shard in range(SHARDS):
        table.reclaim(shard, now)
    assert all(_row(table, worker) == (0, 0, 0, 0, 0) for worker in range(WORKERS))
    assert all(table.wait_s(worker, now) == 0 for worker in range(WORKERS))


def _row(table: Bookings, worker: int) -> tuple[int, ...]:
    return (
        table.in_flight(worker),
        table.decoding(worker),
        table.tokens(worker),
        table.queued_tokens(worker),
        table.reserved(worker),
    )


def test_a_full_shard_goes_on_without_booking() -> None:
    table = new_table()
    numbers = [table.book(0, 0, 0.0, 10, 0) for _ in range(PER_SHARD)]
    assert NONE not in numbers
    assert table.book(0, 0, 0.0, 10, 0) == NONE
    assert table.book(1, 0, 0.0, 10, 0) != NONE
    table.finish(numbers[3], 1.0)
    assert table.book(0, 0, 0.0, 10, 0) == numbers[3]


def test_endings_count_once() -> None:
    table = new_table()
    number = table.book(0, 1, 0.0, 100, 0, reserved=50)
    for _ in range(2):
        table.first_token(number, 1.0)
        assert _row(table, 1) == (1, 1, 100, 0, 50)
    for _ in range(2):
        table.finish(number, 2.0, 7)
        assert _row(table, 1) == (0, 0, 0, 0, 0)


def test_a_dead_shards_bookings_end_and_the_others_stay() -> None:
    memory = mmap.mmap(-1, size_bytes(SHARDS, WORKERS, PER_SHARD))
    table = Bookings(memory, SHARDS, WORKERS, PER_SHARD)
    table.create()
    kept = table.book(1, 2, 0.0, 100, 0)
    pid = os.fork()
    if pid == 0:
        for _ in range(5):
            table.book(0, 2, 0.0, 100, 0, CHARS_PER_TOKEN)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert table.in_flight(2) == 6
    assert table.reclaim(0, 1.0) == 5
    assert _row(table, 2) == (1, 0, 100, 100, 0)
    assert table.wait_s(2, 1.0) > 0
    table.finish(kept, 2.0)
    assert _row(table, 2) == (0, 0, 0, 0, 0)


def test_recovery_happens_once_per_dead_holder() -> None:
    table = new_table()
    assert not table.recover(0, 0.0)
    assert table.recover(1, 0.0)
    assert not table.recover(1, 0.0)


def test_a_slot_with_requests_in_flight_is_not_given_away() -> None:
    table = new_table()
    number = table.book(0, 0, 0.0, 10, 0)
    with pytest.raises(ValueError, match="in flight"):
        table.forget_worker(0)
    table.finish(number, 1.0)
    table.forget_worker(0)
    for outside in (-1, WORKERS):
        with pytest.raises(IndexError):
            table.wait_s(outside, 0.0)


def test_the_oldest_request_of_every_worker() -> None:
    table = new_table()
    first = table.book(0, 1, 5.0, 10, 0)
    table.book(0, 1, 7.0, 10, 0)
    table.book(1, 1, 6.0, 10, 0)
    blind = table.book(1, 2, 9.0, 10, 0, 0, True)
    table.first_token(first, 8.0)

    def oldest() -> list[float]:
        starts = array("d", [inf]) * WORKERS
        for shard in range(SHARDS):
            table.note_oldest(shard, starts)
        return list(starts)

    assert oldest() == [inf, 5.0, 9.0]
    table.finish(first, 9.0, 3)
    table.finish(blind, 9.5, 3)
    assert oldest() == [inf, 6.0, inf]
    with pytest.raises(ValueError, match="8 bytes per worker"):
        table.note_oldest(0, array("d", [inf]))
    with pytest.raises(IndexError):
        table.note_oldest(SHARDS, array("d", [inf]) * WORKERS)


def test_what_was_learned_comes_back_in_another_table() -> None:
    one, other = new_table(), new_table()
    for number in range(40):
        booking = one.book(0, number % 2, float(number), 1000 + number, 500)
        one.first_token(booking, number + 0.1 + number / 1000)
        one.finish(booking, number + 2.0, 50)
    one.lost = 0.25
    other.recall_costs(one.costs())
    other.recall_pace(2, *one.pace(0))
    assert other.costs() == one.costs() != new_table().costs()
    assert other.seconds(700, 300) == one.seconds(700, 300)
    assert (other.output_mean, other.stay_s, other.lost) == (one.output_mean, one.stay_s, 0.25)
    assert (other.tpot_s(2), other.pace(2)) == (one.tpot_s(0), one.pace(0))


@pytest.mark.parametrize("change", [{"per_tokens": inf}, {"stay_s": nan}, {"more": 1.0}])
def test_costs_that_cannot_be_are_refused_before_anything_changes(change: dict[str, float]) -> None:
    table = new_table()
    before = table.costs()
    with pytest.raises(ValueError, match="no costs"):
        table.recall_costs(before | {"base_s": 9.0} | change)
    with pytest.raises(ValueError, match="no costs"):
        table.recall_costs({"base_s": 9.0})
    assert table.costs() == before
    for pace in ((0.0, 1), (nan, 1), (0.1, 0)):
        with pytest.raises(ValueError, match="no pace"):
            table.recall_pace(0, *pace)
