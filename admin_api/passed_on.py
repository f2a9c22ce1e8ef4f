"""Fan-outs of the data port: a shard streams them here, over a socket that only processes of this daemon can open.

It says who the client is. Whether that one may ask is decided here, because tokens are known here alone: a good token
counts within its scope; without one, an address inside of `admin_networks` is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network

from aiohttp import web
from aiohttp.typedefs import Handler

from pointsman.admin_api import peers
from pointsman.admin_api.auth import BearerTokens
from pointsman.admin_api.callers import Caller, Scope

PEER_HEADER = "X-Pointsman-Peer"
"""A client's own header of that name does not get here."""


@web.middleware
async def from_shard(request: web.Request, handler: Handler) -> web.StreamResponse:
    request[peers.PEER] = request.headers.get(PEER_HEADER, "")
    return await handler(request)


class TokenOrNetwork:
    def __init__(self, tokens: BearerTokens, networks: Sequence[str]) -> None:
        self._tokens = tokens
        self._networks = tuple(map(ip_network, networks))

    async def check(self, request: web.Request) -> Caller:
        """Raises RequestError 401, 429."""
        peer = peers.address(request)
        found = self._tokens.known(request)
        if found is not None:
            return found
        address = peers.parse_address(peer)
        if address is not None and any(address in network for network in self._networks):
            return Caller(f"network:{peer}", Scope.ADMIN)
        return await self._tokens.check(request)
