"""Which failures are retried, when, and until when: one row per line of the theory of operation."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.resilience import RetrySection
from pointsman.daemon.resilience.retry import (
    MAX_RETRY_AFTER_S,
    Attempt,
    GiveUp,
    Outcome,
    OutcomeKind,
    Reason,
    Retry,
    RetryPolicy,
    parse_retry_after,
    without_failed,
)

WALL_S = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110's examples
CONNECT = Outcome(OutcomeKind.CONNECT_FAILED)
STALE = Outcome(OutcomeKind.STALE)
RESET = Outcome(OutcomeKind.RESET)
TIMEOUT = Outcome(OutcomeKind.TIMEOUT)


def status(code: int, retry_after_s: float | None = None) -> Outcome:
    return Outcome(OutcomeKind.STATUS, code, retry_after_s)


def error_event(code: int = 0) -> Outcome:
    return Outcome(OutcomeKind.ERROR_EVENT, code)


class Fixed:
    """An rng that always draws the same."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


class Budget:
    def __init__(self, retries: int = 10**6) -> None:
        self.left = retries
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        self.left -= 1
        return self.left >= 0


def decide(
    outcome: Outcome,
    attempt: Attempt | None = None,
    *,
    now: float = 0.0,
    budget: Budget | None = None,
    **section: object,
) -> Retry | GiveUp:
    policy = RetryPolicy(RetrySection(**section))  # type: ignore[arg-type]
    return policy.decide(outcome, attempt or Attempt(started=0.0), now, Fixed(), budget or Budget())


# --- what is retried


@pytest.mark.parametrize("outcome", [CONNECT, STALE, RESET, TIMEOUT, error_event(), error_event(503)])
@pytest.mark.parametrize("resends", [1])
def test_failures_of_the_connection_and_error_events_are_retried(outcome: Outcome, resends: int) -> None:
    assert decide(outcome, Attempt(0.0, resends=resends)) == Retry(0.05, 2)


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_these_statuses_are_retried(code: int) -> None:
    assert decide(status(code)) == Retry(0.05, 2)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 413, 422, 499, 501, 505])
def test_other_statuses_pass_through(code: int) -> None:
    assert decide(status(code)) == GiveUp(Reason.NOT_RETRYABLE)


def test_an_error_event_that_tells_a_client_error_passes_through() -> None:
    assert decide(error_event(400)) == GiveUp(Reason.NOT_RETRYABLE)


@pytest.mark.parametrize(
    ("outcome", "is_retried"), [(CONNECT, True), (RESET, False), (TIMEOUT, False), (status(500), False), (STALE, False)]
)
def test_only_failed_connects_are_retried_whatever_the_list_says(outcome: Outcome, is_retried: bool) -> None:
    verdict = decide(outcome, Attempt(0.0, resends=1), retryable_status=frozenset())
    assert isinstance(verdict, Retry) is is_retried


@pytest.mark.parametrize("outcome", [CONNECT, STALE, RESET, TIMEOUT, status(503), error_event()])
def test_never_after_the_first_byte_of_the_answer(outcome: Outcome) -> None:
    assert decide(outcome, Attempt(0.0, has_begun=True)) == GiveUp(Reason.ANSWER_BEGUN)


# --- re-sending on a fresh connection


def test_a_reused_connection_that_died_is_replaced_at_once_and_once() -> None:
    budget = Budget(0)
    assert decide(STALE, budget=budget) == Retry(0.0, 1, is_resend=True)
    assert budget.asked == 0
    assert decide(STALE, Attempt(0.0, number=1, resends=1)) == Retry(0.05, 2)


def test_a_resend_is_no_retry_so_it_happens_without_retries_and_after_the_last_attempt() -> None:
    assert decide(STALE, max_retries=1) == Retry(0.0, 1, is_resend=True)
    assert decide(STALE, Attempt(0.0, number=5)) == Retry(0.0, 5, is_resend=True)


def test_no_resend_after_the_end_of_the_request() -> None:
    assert decide(STALE, Attempt(0.0, ends_at=9.0), now=9.0) == GiveUp(Reason.DEADLINE)


# --- until when


@pytest.mark.parametrize(("max_retries", "attempts"), [(0, 1), (1, 1), (2, 2), (5, 5)])
def test_max_retries_counts_the_first_attempt(max_retries: int, attempts: int) -> None:
    number = 1
    while isinstance(verdict := decide(RESET, Attempt(0.0, number), max_retries=max_retries), Retry):
        number = verdict.number
    assert number == attempts
    assert verdict == GiveUp(Reason.ATTEMPTS)


def test_no_attempt_begins_after_the_deadline() -> None:
    late = Attempt(started=100.0)
    assert decide(RESET, late, now=101.94, deadline_s=2.0) == Retry(0.05, 2)
    assert decide(RESET, late, now=101.95, deadline_s=2.0) == GiveUp(Reason.DEADLINE)


def test_the_end_of_the_request_bounds_retries_without_a_deadline_of_their_own() -> None:
    assert decide(RESET, Attempt(0.0, ends_at=1.0), now=0.96) == GiveUp(Reason.DEADLINE)


def test_an_empty_budget_ends_it() -> None:
    assert decide(RESET, budget=Budget(0)) == GiveUp(Reason.BUDGET)


def test_the_client_is_told_not_to_retry_only_when_we_did() -> None:
    exhausted = {reason for reason in Reason if GiveUp(reason).is_exhausted}
    assert exhausted == {Reason.ATTEMPTS, Reason.DEADLINE, Reason.BUDGET}


@pytest.mark.parametrize(
    "attempt", [Attempt(0.0, number=5), Attempt(0.0, has_begun=True), Attempt(0.0, ends_at=0.01)], ids=str
)
def test_nothing_is_taken_from_the_budget_for_a_retry_that_is_not_made(attempt: Attempt) -> None:
    budget = Budget()
    assert isinstance(decide(RESET, attempt, budget=budget), GiveUp)
    assert budget.asked == 0


# --- Retry-After


ALONE = Attempt(0.0, has_other_worker=False)


def test_retry_after_is_waited_for_when_there_is_no_other_worker() -> None:
    assert decide(status(503, 7.0), ALONE) == Retry(7.0, 2)
    assert decide(status(503, 7.0)) == Retry(0.05, 2)
    assert decide(status(503, 0.0), ALONE) == Retry(0.05, 2)
    assert decide(status(503, 7.0), ALONE, respect_retry_after=False) == Retry(0.05, 2)


def test_a_retry_after_that_is_too_long_is_the_clients_to_wait_for() -> None:
    assert decide(status(429, 31.0), ALONE) == GiveUp(Reason.RETRY_AFTER)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 120\t", 120.0),
        ("3601", MAX_RETRY_AFTER_S),
        ("9" * 5000, MAX_RETRY_AFTER_S),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0),
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10.0),
        ("Sun Nov  6 08:49:47 1994", 10.0),
        ("Sun, 06 Nov 1994 08:49:27 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_S),
        ("Sunday, 06-Nov-44 08:49:47 GMT", MAX_RETRY_AFTER_S),  # 2044: not more than 50 years ahead
        ("Sunday, 06-Nov-45 08:49:47 GMT", 0.0),  # 1945
        ("Sat, 31 Dec 1994 23:59:60 GMT", MAX_RETRY_AFTER_S),
    ],
)
def test_retry_after_has_two_forms(value: str, seconds: float) -> None:
    assert parse_retry_after(value, WALL_S) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("", "-1", "1.5", "+3", "soon", "²", "٣", "1e3", "0x10"),
        *("Sun, 06 Nov 1994", "Sun, 32 Nov 1994 08:49:37 GMT", "Sun, 06 Xyz 1994 08:49:37 GMT"),
        *("Sun, 06 Nov 1994 25:49:37 GMT", "Sun, 06 Nov 0000 08:49:37 GMT"),
    ],
)
def test_what_is_neither_is_no_retry_after(value: str) -> None:
    assert parse_retry_after(value, WALL_S) is None


@given(value=st.text(max_size=40), wall_s=st.floats(0, 4e9))
def test_any_text_gives_a_bounded_wait_or_none(value: str, wall_s: float) -> None:
    seconds = parse_retry_after(value, wall_s)
    assert seconds is None or 0.0 <= seconds <= MAX_RETRY_AFTER_S


# --- the pause


def test_pauses_grow_by_the_multiplier_up_to_the_cap() -> None:
    policy = RetryPolicy(RetrySection())
    pauses = [policy.backoff_s(number, Fixed()) for number in range(1, 6)]
    assert pauses == pytest.approx([0.05, 0.075, 0.1125, 0.16875, 0.253125])
    assert policy.backoff_s(1000, Fixed()) == 30.0


def test_jitter_stays_inside_the_cap() -> None:
    policy = RetryPolicy(RetrySection())
    assert policy.backoff_s(1, Fixed(0.0)) == pytest.approx(0.04)
    assert policy.backoff_s(1, Fixed(0.999999)) == pytest.approx(0.06, rel=1e-4)
    assert policy.backoff_s(100, Fixed(0.999999)) == 30.0


@given(
    initial=st.floats(0, 1e6),
    longest=st.floats(0, 1e6),
    multiplier=st.floats(1, 10),
    jitter=st.floats(0, 1),
    number=st.integers(1, 10_000),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_every_pause_is_within_its_jitter_and_the_cap(
    initial: float, longest: float, multiplier: float, jitter: float, number: int, draw: float
) -> None:
    section = RetrySection(
        initial_backoff_ms=initial, max_backoff_ms=longest, backoff_multiplier=multiplier, jitter_factor=jitter
    )
    pause = RetryPolicy(section).backoff_s(number, Fixed(draw))
    least = min(initial, longest) * (1 - jitter) / 1000
    assert math.isfinite(pause)
    assert least * (1 - 1e-9) <= pause <= longest / 1000


# --- who is next


@pytest.mark.parametrize(
    ("eligible", "failed", "expected"),
    [([1, 2, 3], {2}, [1, 3]), ([1, 2], {1, 2}, [1, 2]), ([1], {1}, [1]), ([], {1}, []), ([4, 5], set(), [4, 5])],
)
def test_who_failed_this_request_is_left_out_as_long_as_another_is_eligible(
    eligible: Sequence[int], failed: set[int], expected: Sequence[int]
) -> None:
    assert without_failed(eligible, failed) == expected
