"""An attempt of an exchange has failed: whether another one follows, and what becomes of this one.

Theory of operation. Nothing of an answer is out then, or the request for the rest of a broken stream has taken its
place. `resilience.retry` decides, from the outcome and from where the request stands. Around that decision:

    attempt_failed   the connection is given up already: retry, or end the request with the error
    is_retried       the answer is there: set it aside and retry, or have it passed on
    next_attempt     the decision; why none follows is counted
    retry            the failed attempt is released, the next one picks and books anew after the step's pause;
                     a re-send keeps worker and booking, and goes out at once
    release          booking over, breaker told, its worker avoided by what follows (`exchange.failed`)

With a pair `Pair.failed` says which of the two workers is charged and avoided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointsman.daemon.errors import RequestError
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.resilience.breaker import Verdict, verdict_of
from pointsman.daemon.resilience.retry import (
    Attempt,
    GiveUp,
    Outcome,
    OutcomeKind,
    Reason,
    Retry,
    RetryPolicy,
    parse_retry_after,
)
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange


def status_outcome(exchange: Exchange, head: ResponseHead) -> Outcome:
    """Of an error status; with how long the worker asks to wait."""
    value = head.header(b"retry-after")
    if value is None:
        return Outcome(OutcomeKind.STATUS, head.status)
    wall_s = exchange.context.wall_us(exchange.context.now()) / 1e6
    return Outcome(OutcomeKind.STATUS, head.status, parse_retry_after(value.decode("latin-1"), wall_s))


def attempt_failed(exchange: Exchange, outcome: Outcome, error: RequestError) -> None:
    """`error`: what the client is told if no attempt follows."""
    step = next_attempt(exchange, outcome)
    if step is not None:
        retry(exchange, step, outcome)
        return
    release(exchange, outcome)
    exchange.give_up(error)


def is_retried(
    exchange: Exchange, outcome: Outcome, head: ResponseHead, framing: BodyFraming, data: bytes, position: int
) -> bool:
    """Whether another attempt is made instead of passing this answer on."""
    step = next_attempt(exchange, outcome)
    if step is None:
        return False
    upstream, exchange.upstream = exchange.upstream, None
    assert upstream is not None
    upstream.set_aside(head, framing, data, position)
    retry(exchange, step, outcome)
    return True


def next_attempt(exchange: Exchange, outcome: Outcome) -> Retry | None:
    """The one that follows, which is paid for with that; None: none does."""
    context, now = exchange.context, exchange.context.now()
    booked, pool = exchange.booked, exchange.pool
    failed = exchange.failed if booked is None else (*exchange.failed, booked.slot)
    if exchange.pair is not None:
        has_other = exchange.pair.has_other(failed, now)
    else:
        has_other = pool is not None and context.resilience.has_other(pool, failed, now)
    section = (exchange.plan or exchange.table.early_plan(None)).retry
    has_begun = exchange.head is not None and exchange.rest() is None
    attempt = Attempt(
        exchange.request.started,
        exchange.attempts,
        exchange.resends,
        has_begun,
        has_other,
        exchange.watch.ends_at,
    )
    step = RetryPolicy(section).decide(
        outcome, attempt, now, context.rng, lambda: context.resilience.withdraw(section, now)
    )
    if isinstance(step, Retry):
        return step
    _note_given_up(exchange, step)
    return None


def _note_given_up(exchange: Exchange, step: GiveUp) -> None:
    if step.is_exhausted and (exchange.attempts > 1 or step.reason is Reason.BUDGET):
        exchange.is_exhausted = True
        exchange.context.count(at.G_RETRIES_EXHAUSTED)
    if step.reason is Reason.BUDGET:
        exchange.context.count(at.G_BUDGET_EMPTY)


def retry(exchange: Exchange, step: Retry, outcome: Outcome) -> None:
    """The failed attempt's connection is given up, or set aside."""
    if step.is_resend:
        exchange.resends += 1
        exchange.context.count(at.G_UPSTREAM_RESENDS)
        if exchange.pair is not None:
            exchange.pair.renew()
        exchange.send()
        return
    release(exchange, outcome)
    exchange.attempts = step.number
    exchange.resends = 0
    exchange.context.count(at.G_RETRIES)
    exchange.again_in(step.delay_s)


def release(exchange: Exchange, outcome: Outcome) -> None:
    """What the attempt has is let go of."""
    booked = exchange.booked
    exchange.forget_answer()
    if booked is None:
        return
    verdict = verdict_of(outcome.counts_as) if outcome.status else Verdict.FAILURE
    failed: tuple[int, ...] = (booked.slot,)
    if exchange.pair is not None:
        verdict, failed = exchange.pair.failed(outcome, verdict)
    exchange.failed = (*exchange.failed, *failed)
    if outcome.kind is not OutcomeKind.CONNECT_FAILED:
        exchange.context.count_at(booked.slot, at.L_FAILURES)
    exchange.drop_booking(verdict)
