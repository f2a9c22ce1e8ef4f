"""The breaker of one worker, row by row of its table."""

import pytest

from pointsman.config.resilience import BreakerSection
from pointsman.daemon.resilience.breaker import (
    BUCKETS,
    UNCOUNTED,
    WORDS,
    Breaker,
    SavedBreaker,
    State,
    Verdict,
    recall,
    saved,
    verdict_of,
)
from pointsman.daemon.resilience.words import private_words

OK, BAD, NEUTRAL = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
START = 5000.0


class Driven:
    """A breaker, its words and a clock."""

    def __init__(self, **section: object) -> None:
        settings: dict[str, object] = {"failure_threshold": 3, "success_threshold": 2, "timeout_s": 30.0, **section}
        self.breaker = Breaker(BreakerSection(**settings))  # type: ignore[arg-type]
        self.words = private_words(WORDS)
        self.now = START

    def acquire(self, shard: int = 0) -> int | None:
        return self.breaker.acquire(self.words, self.now, shard)

    def record(self, ticket: int | None, verdict: Verdict) -> None:
        assert ticket is not None
        self.breaker.record(self.words, self.now, ticket, verdict)

    def request(self, *verdicts: Verdict) -> None:
        for verdict in verdicts:
            self.record(self.acquire(), verdict)

    def state(self) -> State:
        return self.breaker.view(self.words, self.now).state

    def half_open(self) -> None:
        self.request(BAD, BAD, BAD)
        self.now += 30.0
        assert self.state() is State.HALF_OPEN


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        *((status, OK) for status in (200, 204, 302)),
        *((status, NEUTRAL) for status in (400, 404, 408, 429, 499)),
        *((status, BAD) for status in (500, 502, 503, 504, 529)),
    ],
)
def test_what_counts_as_a_failure(status: int, verdict: Verdict) -> None:
    assert verdict_of(status) is verdict


# --- closed


def test_zeroed_words_are_a_closed_breaker() -> None:
    driven = Driven()
    assert driven.state() is State.CLOSED
    assert driven.breaker.permits(driven.words, driven.now)
    assert driven.breaker.retry_after_s(driven.words, driven.now) == 0.0


def test_failures_in_a_row_open_it_and_the_next_request_on_any_shard_is_refused() -> None:
    driven = Driven()
    driven.request(BAD, BAD)
    assert driven.state() is State.CLOSED
    driven.request(BAD)
    assert driven.state() is State.OPEN
    assert [driven.acquire(shard) for shard in range(4)] == [None] * 4
    assert driven.breaker.retry_after_s(driven.words, driven.now) == 30.0


def test_a_success_ends_the_row() -> None:
    driven = Driven()
    driven.request(BAD, BAD, OK, BAD, BAD)
    assert driven.state() is State.CLOSED


def test_neutral_answers_neither_lengthen_nor_end_the_row() -> None:
    driven = Driven()
    driven.request(*[NEUTRAL] * 50, BAD, BAD, NEUTRAL)
    assert driven.state() is State.CLOSED
    driven.request(BAD)
    assert driven.state() is State.OPEN


# --- the window


def window(**section: object) -> Driven:
    return Driven(**{"failure_threshold": 1000, "failure_rate": 0.5, "min_requests": 10, "window_s": 80.0, **section})


def test_a_failure_rate_opens_it_without_a_row() -> None:
    driven = window()
    driven.request(*[OK, BAD] * 4, OK)
    assert driven.state() is State.CLOSED  # 4 of 9
    driven.request(BAD)
    assert driven.state() is State.OPEN  # 5 of 10


def test_few_requests_say_nothing() -> None:
    driven = window()
    driven.request(*[BAD] * 9)
    assert driven.state() is State.CLOSED


def test_a_rate_below_does_not_open_it() -> None:
    driven = window()
    driven.request(*[OK, OK, BAD] * 100)
    assert driven.state() is State.CLOSED


def test_what_is_older_than_the_window_does_not_count() -> None:
    driven = window()
    driven.request(*[BAD] * 9)
    driven.now += 80.0
    assert driven.breaker.view(driven.words, driven.now).requests == 0
    driven.request(BAD)
    assert driven.state() is State.CLOSED
    view = driven.breaker.view(driven.words, driven.now)
    assert (view.requests, view.failures) == (1, 1)


def test_what_is_a_bucket_younger_than_the_window_does() -> None:
    driven = window()
    driven.request(*[BAD] * 9)
    driven.now += 80.0 * (BUCKETS - 1) / BUCKETS - 0.001
    driven.request(BAD)
    assert driven.state() is State.OPEN


def test_the_window_slides_bucket_by_bucket() -> None:
    driven = window(min_requests=10_000)
    for _ in range(200):
        driven.request(OK)
        driven.now += 1.0
    assert 70 <= driven.breaker.view(driven.words, driven.now).requests <= 80


def test_another_window_is_in_force_at_once() -> None:
    driven = window()
    driven.request(*[BAD] * 9)
    driven.now += 30.0
    driven.breaker = window(window_s=20.0).breaker
    driven.request(BAD)
    assert driven.state() is State.CLOSED


# --- open, half-open


def test_after_the_timeout_one_probe_at_a_time_may_go() -> None:
    driven = Driven()
    driven.request(BAD, BAD, BAD)
    driven.now += 29.9
    assert driven.acquire() is None
    driven.now += 0.1
    assert driven.acquire(0) is not None
    assert driven.acquire(0) is None
    assert driven.acquire(1) is None
    assert driven.breaker.retry_after_s(driven.words, driven.now) == 1.0


def test_successful_probes_close_it_and_the_past_is_forgotten() -> None:
    driven = Driven(failure_rate=0.1, min_requests=3)
    driven.half_open()
    driven.request(OK)
    assert driven.state() is State.HALF_OPEN
    driven.request(OK)
    assert driven.state() is State.CLOSED
    driven.request(BAD, BAD)
    assert driven.state() is State.CLOSED


@pytest.mark.parametrize("successes", [0, 1])
def test_one_failing_probe_opens_it_again_for_the_whole_timeout(successes: int) -> None:
    driven = Driven()
    driven.half_open()
    driven.request(*[OK] * successes, BAD)
    assert driven.state() is State.OPEN
    driven.now += 29.0
    assert driven.acquire() is None
    driven.now += 1.0
    driven.request(OK)
    assert driven.state() is State.HALF_OPEN  # the successes before do not count


def test_a_neutral_probe_gives_the_permit_back_and_decides_nothing() -> None:
    driven = Driven()
    driven.half_open()
    driven.request(*[NEUTRAL] * 20)
    assert driven.state() is State.HALF_OPEN
    driven.request(OK, NEUTRAL, OK)
    assert driven.state() is State.CLOSED


def test_a_probe_is_heard_once() -> None:
    driven = Driven()
    driven.half_open()
    probe = driven.acquire()
    driven.record(probe, OK)
    driven.record(probe, OK)
    driven.record(probe, BAD)
    assert driven.state() is State.HALF_OPEN


# --- tickets that are no longer good


def test_an_answer_from_before_it_opened_decides_nothing_when_half_open() -> None:
    driven = Driven()
    old = [driven.acquire() for _ in range(6)]
    driven.half_open()
    probe = driven.acquire()
    for ticket in old[:3]:
        driven.record(ticket, OK)
    for ticket in old[3:]:
        driven.record(ticket, BAD)
    assert driven.state() is State.HALF_OPEN
    assert driven.acquire() is None
    driven.record(probe, OK)
    driven.request(OK)
    assert driven.state() is State.CLOSED


def test_an_answer_from_before_it_opened_decides_nothing_after_it_closed() -> None:
    driven = Driven(failure_threshold=1)
    old, bad = driven.acquire(), driven.acquire()
    driven.record(bad, BAD)
    driven.now += 30.0
    driven.request(OK, OK)
    assert driven.state() is State.CLOSED
    driven.record(old, BAD)
    assert driven.state() is State.CLOSED
    assert driven.breaker.view(driven.words, driven.now).failures == 0


def test_the_permit_of_a_dead_shard_returns_when_it_is_reaped() -> None:
    driven = Driven()
    driven.half_open()
    lost = driven.acquire(shard=2)
    driven.breaker.release_shard(driven.words, 1)
    assert driven.acquire() is None
    driven.breaker.release_shard(driven.words, 2)
    assert driven.acquire(shard=0) is not None
    driven.record(lost, BAD)
    assert driven.state() is State.HALF_OPEN


def test_a_lost_permit_returns_after_its_lease() -> None:
    driven = Driven(probe_lease_s=15.0)
    driven.half_open()
    lost = driven.acquire()
    driven.now += 14.9
    assert driven.acquire() is None
    driven.now += 0.1
    assert driven.acquire() not in (None, lost)


# --- overruled and disabled


def test_what_is_sent_against_the_breaker_shows_in_the_window_and_decides_nothing() -> None:
    driven = Driven()
    driven.request(BAD, BAD, BAD)
    for _ in range(7):
        driven.record(UNCOUNTED, OK)
    assert driven.state() is State.OPEN
    assert driven.breaker.view(driven.words, driven.now).failure_share == 0.3


def test_a_disabled_breaker_lets_everything_pass_and_counts_nothing() -> None:
    driven = Driven()
    driven.request(BAD, BAD, BAD)
    driven.breaker = Driven(enabled=False).breaker
    assert driven.breaker.permits(driven.words, driven.now)
    assert driven.acquire() == UNCOUNTED
    driven.request(*[BAD] * 100)
    assert driven.breaker.view(driven.words, driven.now).failures == 3


def test_the_view() -> None:
    driven = Driven()
    driven.half_open()
    driven.acquire()
    view = driven.breaker.view(driven.words, driven.now)
    assert (view.state, view.since, view.failures_in_a_row) == (State.HALF_OPEN, START + 30.0, 3)
    assert (view.openings, view.is_probed) == (1, True)


# --- over a restart of the daemon


def test_a_closed_breaker_leaves_nothing_to_save() -> None:
    driven = Driven()
    driven.request(BAD, BAD)
    assert saved(driven.words, driven.now) is None


@pytest.mark.parametrize(("away_s", "state"), [(0.0, State.OPEN), (19.0, State.OPEN), (20.0, State.HALF_OPEN)])
def test_an_open_breaker_goes_on_where_it_was(away_s: float, state: State) -> None:
    before, after = Driven(), Driven()
    before.request(BAD, BAD, BAD)
    before.now += 10.0
    told = saved(before.words, before.now)
    assert told is not None and told == SavedBreaker(10.0, 1)
    after.now = 7.0  # another boot: the monotonic clock began anew
    recall(after.words, told, after.now, away_s)
    assert after.state() is state
    after.now += 30.0
    after.request(OK, OK)
    assert after.state() is State.CLOSED
    assert after.breaker.view(after.words, after.now).openings == 1


def test_a_half_open_breaker_comes_back_with_its_probe_due() -> None:
    before, after = Driven(), Driven()
    before.half_open()
    assert before.acquire() is not None
    told = saved(before.words, before.now)
    assert told is not None and told == SavedBreaker(None, 1)
    recall(after.words, told, after.now, 0.0)
    assert after.state() is State.HALF_OPEN
    assert after.acquire() is not None
    assert after.acquire() is None, "single probes"


def test_what_was_seen_since_counts_more_than_what_was_saved() -> None:
    driven = Driven(timeout_s=5.0)
    driven.request(BAD, BAD, BAD)
    driven.now += 5.0
    driven.request(OK, OK)
    assert driven.state() is State.CLOSED
    recall(driven.words, SavedBreaker(0.0, 9), driven.now, 1.0)
    assert driven.state() is State.CLOSED
