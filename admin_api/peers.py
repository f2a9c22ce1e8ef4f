"""The other end of a connection: which address or, on the unix socket, which user."""

from __future__ import annotations

import ipaddress
import socket
import struct

from aiohttp import web

_CREDENTIALS = struct.Struct("3i")


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
    if request.remote:
        return request.remote
    sock = request.transport and request.transport.get_extra_info("socket")
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size) if sock else b""
        pid, uid, _gid = _CREDENTIALS.unpack(data)
    except (OSError, struct.error):
        return "gone"
    return f"uid={uid} pid={pid}"
