"""The data port's TLS context, whose certificate may change with every generation.

A listener is given one context for its life, and asks it for a new session for every connection. This one passes the
question on to the context of the generation in force: a new certificate counts from the next handshake on, the
connections that are open keep what they began with, and no listener is closed for it.

A connection is nobody's until its handshake is over. Whoever wants to end has to know of those that are not: their
clients were accepted, and will have sent a request by the time that they hear from us.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Self
from weakref import WeakKeyDictionary


class ListenerTls(ssl.SSLContext):
    _in_force: Callable[[], ssl.SSLContext]
    _now: Callable[[], float]
    _begun: WeakKeyDictionary[ssl.SSLObject, float]
    """the sessions of all connections: when each began"""

    def __new__(cls, in_force: Callable[[], ssl.SSLContext], now: Callable[[], float]) -> Self:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        context._in_force = in_force
        context._now = now
        context._begun = WeakKeyDictionary()
        return context

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        session = self._in_force().wrap_bio(*arguments, **options)
        self._begun[session] = self._now()
        return session

    def has_handshakes(self, since: float) -> bool:
        """Whether a client that came after `since` is in its handshake."""
        return any(begun > since and session.version() is None for session, begun in self._begun.items())
