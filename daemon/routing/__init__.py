"""Which worker gets a request. Pure: no I/O, no clock, no randomness of its own.

`pointsman.daemon.routing.Router` (router.py) is the library interface, kept stable for other simulators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointsman.daemon.routing.router import Decision, Request, Router, Signals, Worker

__all__ = ["Decision", "Request", "Router", "Signals", "Worker"]


def __getattr__(name: str) -> Any:
    # Late: whoever needs only the counting policies or the table must not load everything.
    if name not in __all__:
        raise AttributeError(name)
    from pointsman.daemon.routing import router

    return getattr(router, name)
