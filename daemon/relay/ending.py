"""Who ended a request, for the access log."""

from enum import StrEnum


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
