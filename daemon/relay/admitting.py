"""One shard's side of admission: who waits here is told when its turn has come, or that it will not come.

Permits come free on other shards too, and nobody is told of that: a shard with waiters looks every `POLL_S`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from pointsman.config.resilience import PRIORITIES
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.errors import RequestError, not_admitted
from pointsman.daemon.relay.metering import estimated_tokens
from pointsman.daemon.resilience.admission import POLL_S
from pointsman.daemon.resilience.waiting import Waiter, WaiterState
from pointsman.daemon.routing.table import Plan
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.native import key_of_bytes

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext
    from pointsman.daemon.relay.exchange import Exchange

_BULK = PRIORITIES.index("bulk")
_MESSAGES = {
    WaiterState.EXPIRED: "the request waited too long for its turn (shared.admission.queue_timeout_s)",
    WaiterState.DISPLACED: "the queue is full, and requests that go before this one came (shared.admission.queue_size)",
    WaiterState.REFUSED: "as many requests run and wait as may (shared.admission)",
}


class Admitting:
    def __init__(self, context: ShardContext, resilience: SharedResilience) -> None:
        self._context = context
        self._resilience = resilience
        self._late: list[tuple[Waiter, float | None]] = []
        """Permits that could not be given back yet"""
        self._is_polling = False
        self._paused_s = 0.0

    def enter(self, exchange: Exchange, plan: Plan, prompt_tokens: int) -> Waiter | None:
        """The waiter, admitted or waiting; None: it may pass without one. Raises RequestError when it is refused."""
        request, estimate = exchange.request, estimated_tokens(exchange.features, prompt_tokens)
        user = key_of_bytes(request.user) if request.user else 0
        waiter = Waiter(user, _BULK if request.is_internal else plan.priority, estimate, exchange)
        self._stand_still(self._context.now())  # those before it; from here on it waits, too
        changed = self._resilience.enter(waiter, self._context.now())
        if changed is None:
            self._resilience.enter_freely()
            return None
        self._tell([each for each in changed if each is not waiter])
        if waiter.state is WaiterState.WAITING:
            self._poll_soon()
        elif waiter.state is not WaiterState.ADMITTED:
            raise self._refused(waiter)
        return waiter

    def leave(self, waiter: Waiter, tokens: float | None) -> None:
        changed = self._resilience.leave(waiter, self._context.now(), tokens)
        if changed is None:
            self._late.append((waiter, tokens))
            self._poll_soon()
        else:
            waiter.context = None  # the request holds its waiter: no cycle, so that both go at once
            self._tell(changed)

    def _poll_soon(self) -> None:
        if not self._is_polling:
            self._is_polling = True
            self._context.loop.call_later(POLL_S, self._poll)

    def _poll(self) -> None:
        self._is_polling = False
        self._context.table()  # the limits may have changed while nobody asked
        late, self._late = self._late, []
        for waiter, tokens in late:
            self.leave(waiter, tokens)
        now = self._context.now()
        self._stand_still(now)
        self._tell(self._resilience.poll(now))
        if self._late or len(self._resilience.line):
            self._poll_soon()

    def _stand_still(self, now: float) -> None:
        """Nobody waits too long because of a pause."""
        paused_s = self._context.pausing.pause.paused_s(now)
        if paused_s != self._paused_s:
            self._resilience.line.postpone(paused_s - self._paused_s)
            self._paused_s = paused_s

    def _tell(self, changed: list[Waiter]) -> None:
        """In turns of the loop of their own: what a waiter does then may change the line again."""
        for waiter in changed:
            exchange = cast("Exchange", waiter.context)
            if waiter.state is WaiterState.ADMITTED:
                self._soon(exchange.admitted)
            elif waiter.state is not WaiterState.DONE:
                error = self._refused(waiter)
                self._soon(partial(exchange.fail, error))

    def _soon(self, callback: Callable[[], None]) -> None:
        self._context.loop.call_soon(callback)

    def _refused(self, waiter: Waiter) -> RequestError:
        is_late = waiter.state is WaiterState.EXPIRED
        self._context.count(at.G_QUEUE_TIMEOUT if is_late else at.G_QUEUE_FULL)
        refusal = self._resilience.refusal(waiter)
        return not_admitted(refusal.status, refusal.code, _MESSAGES[waiter.state], refusal.retry_after_s)
