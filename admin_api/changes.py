"""Requests that may change something, counted, and refused from the moment when another daemon is to take over."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pointsman.daemon.errors import Fault, RequestError

CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
UPGRADE_PATH = "/upgrade"
"""waits for all the others, and is answered when they have been"""


class Changes:
    def __init__(self) -> None:
        self._under_way = 0
        self._is_closed = False
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        """Raises RequestError 503."""
        if self._is_closed:
            message = "another daemon is taking over; ask again, it will answer"
            raise RequestError(
                503, "UPGRADING", message, fault=Fault.GATEWAY, retryable=True, headers=(("Retry-After", "1"),)
            )
        self._under_way += 1
        self._none.clear()

    def end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._none.set()

    async def close(self, wait_s: float) -> None:
        """No new ones; those under way are waited for, up to `wait_s`: some last for minutes."""
        self._is_closed = True
        try:
            async with asyncio.timeout(wait_s):
                await self._none.wait()
        except TimeoutError:
            return


def counted(changes: Changes) -> Middleware:
    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method not in CHANGING or request.path == UPGRADE_PATH:
            return await handler(request)
        changes.begin()
        try:
            return await handler(request)
        finally:
            changes.end()

    return count
