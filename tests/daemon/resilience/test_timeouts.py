"""The deadlines of a request: scripts of events, and what runs after each."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.resilience import TimeoutsSection
from pointsman.daemon.errors import Fault
from pointsman.daemon.resilience.timeouts import Deadline, Deadlines, Event

SECTION = TimeoutsSection(
    connect_s=5.0, first_token_s=60.0, idle_s=20.0, total_s=3600.0, client_body_s=30.0, client_read_s=40.0
)


def driven(
    *events: tuple[Event, float], section: TimeoutsSection = SECTION, is_stream: bool = True, has_body: bool = True
) -> Deadlines:
    deadlines = Deadlines(section, is_stream=is_stream, has_body=has_body)
    for event, at in events:
        deadlines.on(event, at)
    return deadlines


SENT = ((Event.ARRIVED, 0.0), (Event.BODY_COMPLETE, 1.0), (Event.CONNECTING, 1.0), (Event.SENT, 2.0))


def test_the_way_of_a_stream() -> None:
    deadlines = driven()
    for event, at, armed in (
        (Event.ARRIVED, 0.0, {Deadline.TOTAL: 3600.0, Deadline.CLIENT_BODY: 30.0}),
        (Event.BODY_READ, 10.0, {Deadline.TOTAL: 3600.0, Deadline.CLIENT_BODY: 40.0}),
        (Event.BODY_COMPLETE, 12.0, {Deadline.TOTAL: 3600.0}),
        (Event.CONNECTING, 12.0, {Deadline.TOTAL: 3600.0, Deadline.CONNECT: 17.0}),
        (Event.SENT, 13.0, {Deadline.TOTAL: 3600.0, Deadline.FIRST_TOKEN: 73.0}),
        (Event.ANSWER_READ, 30.0, {Deadline.TOTAL: 3600.0, Deadline.IDLE: 50.0}),
        (Event.ANSWER_READ, 45.0, {Deadline.TOTAL: 3600.0, Deadline.IDLE: 65.0}),
        (Event.CLIENT_STALLED, 46.0, {Deadline.TOTAL: 3600.0, Deadline.CLIENT_READ: 86.0}),
        (Event.CLIENT_READS, 50.0, {Deadline.TOTAL: 3600.0, Deadline.IDLE: 70.0}),
        (Event.ENDED, 51.0, {}),
    ):
        deadlines.on(event, at)
        assert deadlines.armed() == armed
        assert deadlines.next_at == min(armed.values(), default=math.inf)


def test_a_failed_attempt_leaves_only_the_total() -> None:
    for event in (Event.CONNECTING, Event.SENT, Event.ANSWER_READ):
        assert driven(*SENT, (event, 3.0), (Event.FAILED, 4.0)).armed() == {Deadline.TOTAL: 3600.0}


def test_each_attempt_has_its_own_first_token_but_one_total() -> None:
    deadlines = driven(*SENT, (Event.FAILED, 50.0), (Event.CONNECTING, 51.0), (Event.SENT, 52.0))
    assert deadlines.armed() == {Deadline.TOTAL: 3600.0, Deadline.FIRST_TOKEN: 112.0}


def test_an_answer_that_is_no_stream_has_no_first_token() -> None:
    assert driven(*SENT, is_stream=False).armed() == {Deadline.TOTAL: 3600.0}
    deadlines = driven(*SENT[:2], is_stream=False)
    deadlines.told(is_stream=True)
    deadlines.on(Event.SENT, 2.0)
    assert Deadline.FIRST_TOKEN in deadlines.armed()


def test_a_request_without_body_waits_for_none() -> None:
    assert driven(SENT[0], has_body=False).armed() == {Deadline.TOTAL: 3600.0}


@pytest.mark.parametrize(
    ("events", "at", "deadline", "status", "code", "fault"),
    [
        (SENT[:1], 30.0, Deadline.CLIENT_BODY, 408, "request_timeout", Fault.CLIENT),
        (SENT[:3], 6.0, Deadline.CONNECT, 504, "worker_connect_timeout", Fault.WORKER),
        (SENT, 62.0, Deadline.FIRST_TOKEN, 504, "worker_first_token_timeout", Fault.WORKER),
        ((*SENT, (Event.ANSWER_READ, 9.0)), 29.0, Deadline.IDLE, 504, "worker_idle_timeout", Fault.WORKER),
        ((*SENT, (Event.CLIENT_STALLED, 9.0)), 49.0, Deadline.CLIENT_READ, 499, "client_not_reading", Fault.CLIENT),
        (SENT[:2], 3600.0, Deadline.TOTAL, 504, "request_total_timeout", Fault.GATEWAY),
    ],
)
def test_each_ends_with_its_own_code(
    events: tuple[tuple[Event, float], ...], at: float, deadline: Deadline, status: int, code: str, fault: Fault
) -> None:
    deadlines = driven(*events)
    assert deadlines.expired(at - 0.001) is None
    expiry = deadlines.expired(at)
    assert expiry is not None
    assert (expiry.deadline, expiry.at) == (deadline, at)
    assert (expiry.status, expiry.code, expiry.fault) == (status, code, fault)
    assert expiry.is_workers_failure is (fault is Fault.WORKER)


def test_the_total_is_the_workers_failure_only_if_it_never_said_a_word() -> None:
    silent = driven(*SENT, is_stream=False).expired(3600.0)
    assert silent is not None and silent.is_workers_failure
    section = TimeoutsSection(idle_s=0.0)
    long = driven(*SENT, (Event.ANSWER_READ, 9.0), section=section).expired(3600.0)
    assert long is not None and not long.is_workers_failure
    between = driven(*SENT, (Event.FAILED, 9.0), section=section).expired(3600.0)
    assert between is not None and not between.is_workers_failure


def test_seen_late_the_one_that_passed_first_counts() -> None:
    expiry = driven(*SENT).expired(9999.0)
    assert expiry is not None
    assert (expiry.deadline, expiry.at) == (Deadline.FIRST_TOKEN, 62.0)


def test_zero_switches_a_deadline_off() -> None:
    off = TimeoutsSection(
        connect_s=0.0, first_token_s=0.0, idle_s=0.0, total_s=0.0, client_body_s=0.0, client_read_s=0.0
    )
    deadlines = driven(section=off)
    for event in Event:
        deadlines.on(event, 0.0)
        assert deadlines.next_at == math.inf
        assert deadlines.expired(1e12) is None


@given(events=st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 100)), max_size=40))
def test_in_any_order_of_events_what_expires_is_what_is_next(events: list[tuple[Event, float]]) -> None:
    deadlines, now = driven(), 0.0
    for event, step in events:
        now += step
        deadlines.on(event, now)
        at = deadlines.next_at
        if at == math.inf:
            assert deadlines.expired(1e12) is None
        else:
            expiry = deadlines.expired(at)
            assert expiry is not None and expiry.at == at
