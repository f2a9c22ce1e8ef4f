"""Who ended a request, and where it was then, for the access log.

`termination` says it in two letters, as HAProxy does, so that who reads both reads one language:

    who      C  the client          c  the client, by being silent until a deadline
             S  the worker          s  the worker, by being silent until a deadline; the queue, by its length
             P  we refused it       R  we had no room for it       K  an operator: drain, pause, stop
             -  nobody: it is complete
    where    R  before anything was decided      Q  before it was let in      C  on its way to a worker
             H  the worker had it, and had not begun to answer                D  the answer was on its way
             -  complete
"""

from __future__ import annotations

from enum import StrEnum

from pointsman.daemon.errors import Fault

REQUEST_TIMEOUT, WORKER_TIMEOUT = 408, 504
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; it exists in logs and metrics only"""


class Ending(StrEnum):
    COMPLETE = "complete"
    REFUSED = "refused"
    """answered by us with an error"""
    WORKER_BROKE = "worker_broke"
    CLIENT_LEFT = "client_left"
    TIMEOUT = "timeout"
    DRAINED = "drained"
    """its worker was drained, and the deadline of that is over"""
    SHUTDOWN = "shutdown"


COMPLETE = "--"
REFUSED_AT_ONCE = "PR"
_BLAMED = {Fault.CLIENT: "P", Fault.WORKER: "S", Fault.GATEWAY: "R", Fault.OPERATOR: "K"}


def termination(ending: Ending, status: int, blame: Fault | None, phase: str) -> str:
    """`blame`: whose fault the error was that we answered or broke off with; `phase`: Q, C, H or D."""
    if ending is Ending.COMPLETE:
        return COMPLETE
    who = _who(ending, status, blame)
    return who + ("R" if who == "P" and phase == "Q" else phase)


def short_termination(ending: Ending, status: int) -> str:
    """Of a request that no worker was asked."""
    if ending is Ending.REFUSED:
        return "cR" if status == REQUEST_TIMEOUT else REFUSED_AT_ONCE
    return termination(ending, status, None, "R")


def _who(ending: Ending, status: int, blame: Fault | None) -> str:
    match ending:
        case Ending.CLIENT_LEFT:
            return "C"
        case Ending.WORKER_BROKE:
            return "S"
        case Ending.TIMEOUT:
            return "c" if blame is Fault.CLIENT else "s"
        case Ending.DRAINED | Ending.SHUTDOWN:
            return "K"
        case _:
            return "s" if status == WORKER_TIMEOUT else _BLAMED[blame or Fault.CLIENT]
