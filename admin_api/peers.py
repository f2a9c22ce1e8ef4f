"""The other end of a connection: which address or, on the unix socket, which user."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

from aiohttp import web

PEER: Final = web.RequestKey("peer", str)
"""The client's address, where somebody else of this daemon has talked to it."""

_CREDENTIALS = struct.Struct("3i")


def address(request: web.Request) -> str:
    """Of the client; empty on a unix socket."""
    return request.get(PEER) or request.remote or ""


def parse_address(text: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is no address. An IPv4 address that arrived on an IPv6 socket is that IPv4 address."""
    try:
        address = ipaddress.ip_address(str(text).partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(text: str) -> bool:
    address = parse_address(text)
    return address is not None and address.is_loopback


def describe(request: web.Request) -> str:
    """For the log: the address, or `uid=… pid=…` of the process at the other end of a unix socket."""
    if known := address(request):
        return known
    found = _credentials(request)
    return "gone" if found is None else f"uid={found[1]} pid={found[0]}"


def user_of(request: web.Request) -> int | None:
    """The user id of the process at the other end of a unix socket."""
    found = _credentials(request)
    return None if found is None else found[1]


def _credentials(request: web.Request) -> tuple[int, int] | None:
    """(process id, user id)"""
    sock = request.transport and request.transport.get_extra_info("socket")
    if not sock or sock.family != socket.AF_UNIX:
        return None
    try:
        pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    except (OSError, struct.error):
        return None
    return pid, uid
