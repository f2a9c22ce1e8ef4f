"""The data port's TLS context, whose certificate may change with every generation.

A listener is given one context for its life, and asks it for a new session for every connection. This one passes the
question on to the context of the generation in force: a new certificate counts from the next handshake on, the
connections that are open keep what they began with, and no listener is closed for it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Self


class ListenerTls(ssl.SSLContext):
    _in_force: Callable[[], ssl.SSLContext]

    def __new__(cls, in_force: Callable[[], ssl.SSLContext]) -> Self:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        context._in_force = in_force
        return context

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self._in_force().wrap_bio(*arguments, **options)
