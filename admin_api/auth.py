"""Who may use the admin API: whoever can open the unix socket; over TCP whoever shows a token, within its scope.

Wrong tokens are answered ever later, per peer, and a peer that goes on is not heard for a while. Not so on loopback:
all users of the machine share that address, and one must not lock out the others; there the delay has to do (and the
tokens that we generate cannot be guessed at any speed). A request without a token is refused at once and costs nothing:
nobody guesses that way.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from pointsman.admin_api.answers import refused
from pointsman.admin_api.callers import CALLER, Caller, authorize, local_caller
from pointsman.admin_api.peers import address, is_loopback
from pointsman.admin_api.tokens import TokenStore
from pointsman.daemon.errors import RequestError
from pointsman.daemon.telemetry.logs import log

PUBLIC_PATHS = frozenset({"/health", "/docs", "/openapi.json", "/openapi-data.json"})


class AdminAuth(Protocol):
    async def check(self, request: web.Request) -> Caller:
        """Raises RequestError (401, 429) for a request that may not pass."""
        ...


class Trusting:
    """For the unix socket (its mode decides who may connect) and for `--admin-no-auth`."""

    async def check(self, request: web.Request) -> Caller:
        """Passes everybody."""
        return local_caller(request)


@dataclass(slots=True)
class _Peer:
    failures: int
    last_at: float


class Throttle:
    """Counts wrong tokens per peer; pure. Times in seconds of any one clock."""

    MAX_PEERS = 1024
    FORGET_S = 60.0
    FREE_FAILURES = 3
    LOCKED_FAILURES = 10
    FIRST_DELAY_S = 0.25
    MAX_DELAY_S = 2.0

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def locked_for_s(self, peer: str, now: float) -> float:
        """How long the peer is not heard from now on; 0 = it is."""
        known = self._peers.get(peer)
        if known is None or known.failures < self.LOCKED_FAILURES or is_loopback(peer):
            return 0.0
        return max(0.0, known.last_at + self.FORGET_S - now)

    def failed(self, peer: str, now: float) -> float:
        """Notes a wrong token; returns how long to keep the answer back."""
        known = self._peers.pop(peer, None)
        if known is None or now - known.last_at > self.FORGET_S:
            known = _Peer(0, now)
        known.failures, known.last_at = known.failures + 1, now
        self._peers[peer] = known
        if len(self._peers) > self.MAX_PEERS:
            self._peers.popitem(last=False)
        excess = min(known.failures - self.FREE_FAILURES, 16)
        return 0.0 if excess <= 0 else min(self.MAX_DELAY_S, self.FIRST_DELAY_S * 2 ** (excess - 1))


class BearerTokens:
    def __init__(
        self,
        tokens: TokenStore,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tokens = tokens
        self._throttle = Throttle()
        self._now = now
        self._sleep = sleep

    def known(self, request: web.Request) -> Caller | None:
        """Whose token it shows; None when that is nobody's, or the peer is not heard at the moment."""
        token = _bearer(request.headers.get(hdrs.AUTHORIZATION, ""))
        is_heard = not self._throttle.locked_for_s(address(request), self._now())
        return self._tokens.find(token) if token and is_heard else None

    async def check(self, request: web.Request) -> Caller:
        token = _bearer(request.headers.get(hdrs.AUTHORIZATION, ""))
        if not token:
            raise _unauthorized("this needs a token: send it as `Authorization: Bearer TOKEN`")
        peer = address(request)
        wait_s = self._throttle.locked_for_s(peer, self._now())
        if wait_s:
            retry = (("Retry-After", str(int(wait_s) + 1)),)
            raise refused(429, "TOO_MANY_FAILURES", "too many wrong tokens; wait", headers=retry, close=True)
        caller = self._tokens.find(token)
        if caller is not None:
            return caller
        log("admin_token_refused", level="warning", peer=peer)
        await self._sleep(self._throttle.failed(peer, self._now()))
        raise _unauthorized("the token is not one of the daemon's")


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(message: str) -> RequestError:
    return refused(401, "UNAUTHORIZED", message, headers=((hdrs.WWW_AUTHENTICATE, "Bearer"),))


def authenticator(auth: AdminAuth) -> Middleware:
    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in PUBLIC_PATHS:
            caller = request[CALLER] = await auth.check(request)
            authorize(request, caller)
        return await handler(request)

    return authenticate
