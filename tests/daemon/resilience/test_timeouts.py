"""Deadlines of a request, phase by phase, on a virtual clock."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.resilience import TimeoutsSection
from pointsman.daemon.resilience.timeouts import LOOKS, MISSED, Deadline, Watch

SECTION = TimeoutsSection(first_token_s=10.0, idle_s=4.0, total_s=100.0, client_read_s=6.0)


def watch(section: TimeoutsSection = SECTION, *, is_stream: bool = True) -> Watch:
    return Watch(section, 1000.0, is_stream=is_stream)


def test_a_request_that_waits_for_its_turn_has_only_the_total() -> None:
    waiting = watch()
    assert waiting.look(1099.9, 0)[0] is None
    assert waiting.look(1100.0, 0)[0] is Deadline.TOTAL


def test_the_first_token_counts_from_the_sending_and_for_each_attempt() -> None:
    each = watch()
    each.sent(1005.0)
    assert each.look(1014.9, 0)[0] is None
    assert each.look(1015.0, 0)[0] is Deadline.FIRST_TOKEN
    each.failed()
    assert each.look(1016.0, 0)[0] is None
    each.sent(1020.0)
    assert each.look(1029.0, 0)[0] is None
    assert each.look(1030.0, 0)[0] is Deadline.FIRST_TOKEN


def test_an_answer_that_is_no_stream_has_no_first_token() -> None:
    plain = watch(is_stream=False)
    plain.sent(1000.0)
    assert plain.look(1099.0, 0)[0] is None


def test_an_answer_that_stands_still() -> None:
    each = watch()
    each.sent(1000.0)
    each.has_answer = True
    assert each.look(1001.0, 5)[0] is None
    assert each.look(1004.9, 5)[0] is None
    assert each.look(1004.9, 6)[0] is None
    assert each.look(1008.8, 6)[0] is None
    assert each.look(1008.9, 6)[0] is Deadline.IDLE


def test_a_client_that_does_not_read_stops_the_other_clock() -> None:
    each = watch()
    each.has_answer = True
    each.look(1001.0, 5)
    assert each.stalled(1002.0) == 1008.0
    assert each.look(1007.9, 5)[0] is None
    each.reads_again(1007.9)
    assert each.look(1011.8, 5)[0] is None
    each.stalled(1011.8)
    assert each.look(1017.8, 5)[0] is Deadline.CLIENT_READ


def test_nothing_runs_where_all_is_off() -> None:
    off = TimeoutsSection(connect_s=0, first_token_s=0, idle_s=0, total_s=0, client_body_s=0, client_read_s=0)
    each = watch(off)
    assert each.first_look() == math.inf
    each.sent(1000.0)
    assert each.look(1e9, 0) == (None, math.inf)
    each.has_answer = True
    assert each.stalled(1e9) == math.inf
    assert each.look(2e9, 0) == (None, math.inf)


@given(st.floats(0.01, 100), st.lists(st.floats(0.001, 50), max_size=30))
def test_a_stream_is_cut_after_one_to_one_and_a_quarter_of_its_idle_time(idle_s: float, gaps: list[float]) -> None:
    """Whoever asks when it is told to misses nothing: neither too early nor late."""
    section = TimeoutsSection(idle_s=idle_s, first_token_s=0, total_s=0)
    each = Watch(section, 0.0, is_stream=True)
    each.sent(0.0)
    each.has_answer = True
    moments, at = [0.0], 0.0
    for gap in gaps:
        at += gap
        moments.append(at)
    look = each.first_look()
    while True:
        progress = sum(moment <= look for moment in moments)
        missed, following = each.look(look, progress)
        last = max(moment for moment in moments if moment <= look)
        if missed:
            assert missed is Deadline.IDLE
            slack = 1e-6 * (1 + look)
            assert idle_s - slack <= look - last + idle_s / LOOKS and look - last <= idle_s * (1 + 1 / LOOKS) + slack
            return
        assert following > look
        look = following


def test_every_deadline_has_its_ending() -> None:
    assert set(MISSED) == set(Deadline)
    assert {deadline for deadline, how in MISSED.items() if how.status == 504} == {
        Deadline.CONNECT,
        Deadline.FIRST_TOKEN,
        Deadline.IDLE,
        Deadline.TOTAL,
    }


def test_clocks_of_engines_stand_still_while_the_daemon_is_paused() -> None:
    each = watch()
    each.sent(1000.0, paused_s=50.0)
    assert each.look(1009.0, 0, 50.0)[0] is None
    assert each.look(1029.9, 0, 70.0)[0] is None, "20 s of pause"
    assert each.look(1030.1, 0, 70.0)[0] is Deadline.FIRST_TOKEN
    each.has_answer = True
    each.look(1031.0, 5, 70.0)
    assert each.look(1044.0, 5, 80.0)[0] is None
    assert each.look(1045.1, 5, 80.0)[0] is Deadline.IDLE
    assert each.look(1100.0, 6, 155.0)[0] is Deadline.TOTAL, "the total goes on"


def test_pings_are_due_as_long_as_nothing_has_come() -> None:
    each = watch(TimeoutsSection(ping_s=2.0))
    assert not each.is_ping_due(1010.0), "nothing is sent yet"
    each.sent(1001.0)
    assert each.first_look() == 1002.0
    assert [moment for moment in (1001.9, 1002.0, 1002.1, 1003.9, 1004.0, 1009.0) if each.is_ping_due(moment)] == [
        1002.0,
        1004.0,
        1009.0,
    ]
    assert each.look(1009.0, 0)[1] <= 1011.0
    each.has_answer = True
    assert not each.is_ping_due(1020.0)
    assert not watch(is_stream=False).is_ping_due(1e6)
