"""The shared segment between real processes: what one writes the other reads, whoever dies."""

import os
import signal
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment, SegmentError
from tests.fakes.leeway import leeway


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_attach_sees_the_same_memory() -> None:
    segment = Segment.create(2, 8)
    other = Segment.attach(segment.fd)
    segment.words.book(1, 3, 100)
    other.words.book(0, 3, 50)
    assert segment.inflight(3) == 2
    assert other.total(3, at.L_INFLIGHT_BYTES) == 150
    other.words.release(0, 3, 50)
    segment.words.release(1, 3, 100)
    assert segment.inflight(3) == 0
    assert segment.total(3, at.L_PICKS) == 2


def test_survey_shows_only_workers_that_are_up() -> None:
    segment = Segment.create(2, 4)
    segment.set_status(1, at.STATUS_UP)
    segment.words.book(0, 1, 1)
    segment.words.book(1, 1, 1)
    assert segment.words.survey((0, 1, 2)) == [-1, 2, -1]
    with pytest.raises(IndexError):
        segment.words.survey((9,))


def test_status_changes_only_from_the_expected_one() -> None:
    segment = Segment.create(1, 2)
    segment.set_status(0, at.STATUS_DRAINING)
    assert not segment.set_status(0, at.STATUS_DOWN, expected=at.STATUS_UP)
    assert segment.status(0) == at.STATUS_DRAINING


def test_a_foreign_descriptor_is_refused() -> None:
    fd = os.memfd_create("foreign")
    os.ftruncate(fd, 1 << 16)
    with pytest.raises(SegmentError):
        Segment.attach(fd)
    os.close(fd)
    segment = Segment.create(1, 1)
    segment.words.put(at.H_VERSION, at.VERSION + 1)
    with pytest.raises(SegmentError):
        Segment.attach(segment.fd)


def test_reclaiming_a_dead_shard_leaves_the_others_and_the_counters() -> None:
    segment = Segment.create(2, 4)

    def die_with_requests() -> NoReturn:
        for _ in range(5):
            segment.words.book(0, 2, 10)
        segment.cells[segment.layout.gauge(0, at.G_CONNECTIONS)] = 7
        segment.cells[segment.layout.gauge(0, at.G_LOG_DROPPED)] = 3
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    segment.words.book(1, 2, 10)
    os.waitpid(in_child(die_with_requests), 0)
    assert segment.inflight(2) == 6
    assert segment.reclaim_shard(0) == 5
    assert segment.inflight(2) == 1
    assert segment.total(2, at.L_PICKS) == 6
    assert segment.gauge(0, at.G_CONNECTIONS) == 0
    assert segment.gauge(0, at.G_LOG_DROPPED) == 3


def test_a_holder_that_dies_is_noticed() -> None:
    segment = Segment.create(1, 1)

    def die_holding() -> None:
        assert segment.words.lock()
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(die_holding), 0)
    with segment.routing_lock() as held:
        assert held
    assert segment.lock_recoveries == 1
    with segment.routing_lock() as held:
        assert held
    assert segment.lock_recoveries == 1


def test_a_holder_that_is_stopped_costs_the_deadline_and_no_more() -> None:
    segment = Segment.create(1, 1)
    ready, wake = os.pipe()

    def stop_holding() -> None:
        segment.words.lock()
        os.write(wake, b"x")
        signal.pause()

    pid = in_child(stop_holding)
    try:
        os.read(ready, 1)
        started = time.monotonic()
        with segment.routing_lock() as held:
            assert not held
        assert time.monotonic() - started < 0.5 * leeway()
        assert (segment.lock_timeouts, segment.lock_waits) == (1, 1)
        assert segment.set_status(0, at.STATUS_UP)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_cursor_gives_every_caller_another_number() -> None:
    segment = Segment.create(2, 1)
    read, write = os.pipe()

    def take() -> None:
        numbers = [segment.words.next_cursor() for _ in range(1000)]
        os.write(write, b"".join(number.to_bytes(4, "little") for number in numbers))

    pids = [in_child(take) for _ in range(2)]
    seen = b""
    while len(seen) < 8000:
        seen += os.read(read, 8000)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len({seen[i : i + 4] for i in range(0, 8000, 4)}) == 2000


def test_clearing_a_slot_needs_it_whole() -> None:
    segment = Segment.create(2, 3)
    for slot in range(3):
        segment.set_status(slot, at.STATUS_UP)
        segment.words.book(1, slot, 1)
    segment.clear_worker(1)
    assert segment.status(1) == at.STATUS_FREE
    assert [segment.total(slot, at.L_PICKS) for slot in range(3)] == [1, 0, 1]


def test_closing_names_the_slots_whose_time_is_over_and_that_have_requests_on_that_shard() -> None:
    segment = Segment.create(2, 5)
    for slot in range(4):
        segment.words.book(1, slot, 10)
    segment.set_close_at(0, 5.0)
    segment.set_close_at(1, 5.001)
    segment.set_close_at(2, -3.0)  # the deadline was over before it was written
    segment.set_close_at(4, 1.0)
    assert segment.words.closing(1, 4_999) == [2]
    assert segment.words.closing(1, 5_000) == [0, 2]
    assert segment.words.closing(0, 9_000) == []
    segment.words.release(1, 0, 10)
    assert segment.words.closing(1, 9_000) == [1, 2]
    segment.set_close_at(1, None)
    assert (segment.close_at_s(1), segment.close_at_s(0)) == (None, 5.0)
    segment.clear_worker(2)
    assert segment.words.closing(1, 9_000) == []
