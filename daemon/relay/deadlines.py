"""How an exchange goes on that has missed a deadline; `resilience.timeouts` says which one.

connect        kept where the connection is made (`connecting`): it has failed like any that cannot be made
first_token    the attempt has failed
idle           the stream has broken: it is cut, or gone on with by the next attempt
client_read    the client's connection is at its end
total          so is the request; the worker is charged if it has been silent all the time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointsman.daemon.dispatch.verdicts import NUMBERS
from pointsman.daemon.errors import Fault, worker_timeout
from pointsman.daemon.relay.ending import Ending
from pointsman.daemon.relay.retrying import attempt_failed
from pointsman.daemon.resilience.breaker import Verdict
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind
from pointsman.daemon.resilience.timeouts import DEADLINES, MISSED, Deadline
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import FAILED

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange


def miss(exchange: Exchange, deadline: Deadline) -> None:
    exchange.context.count(at.G_TIMEOUTS + DEADLINES.index(deadline))
    code, section = MISSED[deadline].code, exchange.watch.section
    match deadline:
        case Deadline.CLIENT_READ:
            exchange.is_keep_alive = False
            exchange.client.transport.abort()
            exchange.blame = Fault.CLIENT
            exchange.end(exchange.status, Ending.TIMEOUT)
        case Deadline.FIRST_TOKEN:
            exchange.abandon_upstream()
            error = worker_timeout(f"the worker sent no token within {section.first_token_s:g} s", code)
            attempt_failed(exchange, Outcome(OutcomeKind.TIMEOUT), error)
        case Deadline.IDLE:
            error = worker_timeout(f"the worker's answer stood still for {section.idle_s:g} s", code)
            if exchange.is_resumed():
                exchange.abandon_upstream()
                attempt_failed(exchange, Outcome(OutcomeKind.TIMEOUT), error)
            else:
                exchange.cut(error, Ending.TIMEOUT, verdict=FAILED)
        case _:
            error = worker_timeout(f"no complete answer within {section.total_s:g} s", code)
            exchange.is_exhausted = exchange.head is None
            exchange.finish_with(error, Ending.TIMEOUT, NUMBERS[_verdict_of_total(exchange)])


def _verdict_of_total(exchange: Exchange) -> Verdict:
    if exchange.pair is not None and exchange.head is None:
        return exchange.pair.failed(Outcome(OutcomeKind.TIMEOUT), Verdict.FAILURE)[0]
    is_silent = exchange.upstream is not None and not exchange.watch.has_answer
    return Verdict.FAILURE if is_silent else Verdict.NEUTRAL
