"""Whether a failed attempt is followed by another one, and when.

Theory of operation. An attempt ends in an `Outcome`; `decide` goes down this list and stops at the first line that
holds:

    the client has got a byte of the answer             give up: ANSWER_BEGUN
    a reused connection died unanswered, first time     send again at once, not counted as an attempt
    the outcome is not retryable (table below)          give up: NOT_RETRYABLE
    that was the last attempt                           give up: ATTEMPTS
    the worker asks to wait longer than we would        give up: RETRY_AFTER
    the next attempt would begin after a deadline       give up: DEADLINE
    the retry budget is empty                           give up: BUDGET
    otherwise                                           retry after a pause

    outcome          retryable
    CONNECT_FAILED   always: nothing was sent
    STALE            as 502, after its one re-send
    RESET            as 502
    TIMEOUT          as 504 (no head in time)
    STATUS           its status
    ERROR_EVENT      its status, 500 if it tells none: the first event of a stream is an error (first-chunk gate)

"as 502" and "its status" mean: if it is in `retryable_status`. The budget comes last, so that nothing is taken for
a retry that is not made.

The pause is min(initial · multiplier^(n-1), max) after the n-th attempt, times 1 ± jitter, and then cut to max
again: SGLang's formula, whose jitter may exceed the cap. Retry-After is about the worker that sent it: it is waited
for only when there is no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum

from pointsman.config.resilience import RetrySection
from pointsman.daemon.resilience.words import Rng

MAX_RETRY_AFTER_S = 3600.0
"""What a worker may ask for; more is taken as this."""
_MAX_EXPONENT = 100


class OutcomeKind(Enum):
    CONNECT_FAILED = "connect_failed"
    STALE = "stale"
    RESET = "reset"
    TIMEOUT = "timeout"
    STATUS = "status"
    ERROR_EVENT = "error_event"


_COUNTS_AS = {OutcomeKind.STALE: 502, OutcomeKind.RESET: 502, OutcomeKind.TIMEOUT: 504, OutcomeKind.ERROR_EVENT: 500}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt failed. `status`: of the head, or what an error event tells; 0 = none."""

    kind: OutcomeKind
    status: int = 0
    retry_after_s: float | None = None

    @property
    def counts_as(self) -> int:
        """The status that it is judged by, and answered with where the worker sent none."""
        return self.status or _COUNTS_AS.get(self.kind, 502)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Where a request stands when an attempt has failed. Times are seconds of the monotonic clock."""

    started: float
    """Arrival of the request."""
    number: int = 1
    """Attempts made, this one included; re-sends are none."""
    resends: int = 0
    """Over all attempts."""
    has_begun: bool = False
    """A byte of the answer reached the client."""
    has_other_worker: bool = True
    """One that has not failed this request is eligible."""
    ends_at: float = math.inf
    """When the request ends in any case."""


class Reason(StrEnum):
    ANSWER_BEGUN = "answer_begun"
    NOT_RETRYABLE = "not_retryable"
    ATTEMPTS = "attempts"
    RETRY_AFTER = "retry_after"
    DEADLINE = "deadline"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True)
class Retry:
    """Send again after `delay_s`, as the attempt `number`. A re-send stays with its worker, a retry picks anew."""

    delay_s: float
    number: int
    is_resend: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: Reason

    @property
    def is_exhausted(self) -> bool:
        """We did or may do no more: `x-should-retry: false`, for the SDK would multiply our attempts by its own."""
        return self.reason in (Reason.ATTEMPTS, Reason.DEADLINE, Reason.BUDGET)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    section: RetrySection

    def backoff_s(self, number: int, rng: Rng) -> float:
        """The pause after the attempt `number` (from 1) has failed."""
        section = self.section
        growth = section.backoff_multiplier ** min(max(number - 1, 0), _MAX_EXPONENT)
        pause_ms = min(section.initial_backoff_ms * growth, section.max_backoff_ms)
        pause_ms *= 1.0 + section.jitter_factor * (2.0 * rng.random() - 1.0)
        return min(pause_ms, section.max_backoff_ms) / 1000.0

    def is_retryable(self, outcome: Outcome) -> bool:
        return outcome.kind is OutcomeKind.CONNECT_FAILED or outcome.counts_as in self.section.retryable_status

    def decide(
        self, outcome: Outcome, attempt: Attempt, now: float, rng: Rng, withdraw: Callable[[], bool]
    ) -> Retry | GiveUp:
        """`withdraw` takes one retry from the budget; it is asked last, and only if all else speaks for a retry."""
        if attempt.has_begun:
            return GiveUp(Reason.ANSWER_BEGUN)
        latest = self._latest(attempt)
        if outcome.kind is OutcomeKind.STALE and attempt.resends == 0:
            return Retry(0.0, attempt.number, is_resend=True) if now < latest else GiveUp(Reason.DEADLINE)
        if not self.is_retryable(outcome):
            return GiveUp(Reason.NOT_RETRYABLE)
        if attempt.number >= self.section.max_retries:
            return GiveUp(Reason.ATTEMPTS)
        asked = self._asked_s(outcome, attempt)
        if asked * 1000.0 > self.section.max_backoff_ms:
            return GiveUp(Reason.RETRY_AFTER)
        delay = max(asked, self.backoff_s(attempt.number, rng))
        if now + delay >= latest:
            return GiveUp(Reason.DEADLINE)
        return Retry(delay, attempt.number + 1) if withdraw() else GiveUp(Reason.BUDGET)

    def _latest(self, attempt: Attempt) -> float:
        deadline_s = self.section.deadline_s
        return min(attempt.ends_at, attempt.started + deadline_s) if deadline_s else attempt.ends_at

    def _asked_s(self, outcome: Outcome, attempt: Attempt) -> float:
        if outcome.retry_after_s is None or attempt.has_other_worker or not self.section.respect_retry_after:
            return 0.0
        return outcome.retry_after_s


def without_failed(eligible: Sequence[int], failed: Collection[int]) -> Sequence[int]:
    """Who may take the next attempt: nobody who failed this request, as long as another is eligible."""
    return [worker for worker in eligible if worker not in failed] or eligible


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CLOCK = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
# RFC 9110 5.6.7: the preferred form, and the two obsolete ones that a recipient must understand.
_DATES = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"[a-z]{{3}}, (?P<day>[0-9]{{2}}) (?P<month>[a-z]{{3}}) (?P<year>[0-9]{{4}}) {_CLOCK} GMT",
        rf"[a-z]{{6,9}}, (?P<day>[0-9]{{2}})-(?P<month>[a-z]{{3}})-(?P<year>[0-9]{{2}}) {_CLOCK} GMT",
        rf"[a-z]{{3}} (?P<month>[a-z]{{3}}) (?P<day>[ 0-9][0-9]) {_CLOCK} (?P<year>[0-9]{{4}})",
    )
)


def parse_retry_after(value: str, wall_s: float) -> float | None:
    """Seconds from now, 0 … MAX_RETRY_AFTER_S; None when it is neither form of RFC 9110. `wall_s`: since 1970."""
    value = value.strip(" \t")
    if value.isascii() and value.isdigit():
        return MAX_RETRY_AFTER_S if len(value) > 9 else min(float(value), MAX_RETRY_AFTER_S)
    for form in _DATES:
        if match := form.fullmatch(value):
            at = _timestamp(match, wall_s)
            return None if at is None else min(max(at - wall_s, 0.0), MAX_RETRY_AFTER_S)
    return None


def _timestamp(match: re.Match[str], wall_s: float) -> float | None:
    month = match["month"].lower()
    if month not in _MONTHS:
        return None
    year = int(match["year"])
    if len(match["year"]) == 2:
        year = _full_year(year, datetime.fromtimestamp(wall_s, UTC).year)
    second = min(int(match["second"]), 59)  # 60 is a leap second
    day, hour, minute = int(match["day"]), int(match["hour"]), int(match["minute"])
    try:
        return datetime(year, _MONTHS.index(month) + 1, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _full_year(two_digits: int, this_year: int) -> int:
    """RFC 9110 5.6.7: what would be more than 50 years ahead is the past century's."""
    year = this_year - this_year % 100 + two_digits
    if year > this_year + 50:
        return year - 100
    return year + 100 if year <= this_year - 50 else year
