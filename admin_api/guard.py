"""What a request must look like before anybody looks at who sent it.

The admin API can do anything to the gateway, and it listens where a browser on the same machine reaches it. A page that
somebody visits can make that browser send requests here: with a name of its own that it points to 127.0.0.1 (DNS
rebinding: such a request has a foreign Host), or from its own origin (with Origin, Sec-Fetch-Site, or one of the three
content types that browsers send without asking). None of these may pass, token or not.

Bodies are received here too, once, with a bound and a deadline: aiohttp has none for them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from pointsman.admin_api.answers import bad_request, refused
from pointsman.admin_api.callers import route_of
from pointsman.admin_api.peers import parse_address
from pointsman.daemon.errors import RequestError

MAX_BODY_BYTES = 1 << 20
MAX_TENSORS_BYTES = 64 << 20
"""of /update_weights_from_tensor: handles of all tensors of a bucket, for every rank of an engine"""
BODY_TIMEOUT_S = 10.0
"""from the end of the head to the end of the body"""

# What a browser sends to other sites without asking them first. Some clients name a type for an empty body (aiohttp's
# says application/octet-stream); with any but these that is fine.
_SENT_BY_FORMS = re.compile(r"(text|multipart)/|application/x-www-form-urlencoded")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_ONCE = (hdrs.HOST, hdrs.AUTHORIZATION, hdrs.CONTENT_TYPE, hdrs.ORIGIN)


def guard(host_names: Collection[str]) -> Middleware:
    """`host_names`: what else may stand in Host, beside loopback and our own address; with or without port."""
    allowed = frozenset(name.lower() for name in host_names)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        _check_repeated(request)
        _check_host(request, allowed)
        _check_origin(request)
        _check_content_type(request)
        _check_size(request)
        return await handler(request)

    return check


def guard_of_passed() -> Middleware:
    """For what came in on the data port. Nobody says under which name that is reached, so browsers get nothing."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        _check_repeated(request)
        if hdrs.ORIGIN in request.headers or request.headers.get("Sec-Fetch-Site", "none").lower() != "none":
            raise refused(403, "CROSS_SITE", "requests from pages are refused")
        _check_content_type(request)
        _check_size(request)
        return await handler(request)

    return check


def body_receiver(timeout_s: float = BODY_TIMEOUT_S) -> Middleware:
    """After authentication: reads the body, so that handlers find it there. A stranger's is never read."""

    @web.middleware
    async def receive(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.can_read_body:
            if (limit := most_bytes(request)) != MAX_BODY_BYTES:
                request = request.clone(client_max_size=limit)
            try:
                async with asyncio.timeout(timeout_s):
                    await request.read()
            except TimeoutError:
                raise refused(408, "REQUEST_TIMEOUT", "the body did not arrive in time", close=True) from None
        return await handler(request)

    return receive


def _check_repeated(request: web.Request) -> None:
    for name in _ONCE:
        if len(request.headers.getall(name, ())) > 1:
            raise bad_request(f"the header {name} occurs more than once")


# --- Host


def _check_host(request: web.Request, allowed: frozenset[str]) -> None:
    sockname = request.transport and request.transport.get_extra_info("sockname")
    if not isinstance(sockname, tuple):
        return  # a unix socket: no browser gets here
    text = request.headers.get(hdrs.HOST, "").lower()
    if text in allowed:
        return
    host = _authority(text)
    if host is None or not _is_ours(host, allowed, sockname):
        raise _misdirected(text)


def _is_ours(host: SplitResult, allowed: frozenset[str], sockname: tuple[object, ...]) -> bool:
    name = host.hostname or ""
    if name in allowed or name == "localhost":
        return True
    address = parse_address(name)
    if address is None:
        return False
    return address.is_loopback or (address == parse_address(sockname[0]) and (host.port or 80) == sockname[1])


def _authority(text: str) -> SplitResult | None:
    """`host[:port]`, or None when it is anything else."""
    try:
        parts = urlsplit(f"//{text}")
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.netloc == text and "@" not in text else None


def _misdirected(host: str) -> RequestError:
    message = f"this is not {host[:100]!r}; use the address that the daemon listens on (Host is checked)"
    return refused(421, "HOST_NOT_ALLOWED", message, close=True)


# --- browsers


def _check_origin(request: web.Request) -> None:
    if request.headers.get("Sec-Fetch-Site", "none").lower() not in ("none", "same-origin"):
        raise refused(403, "CROSS_SITE", "requests from other sites' pages are refused")
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return
    scheme, _, authority = origin.lower().partition("://")
    if scheme not in ("http", "https") or authority != request.headers.get(hdrs.HOST, "").lower():
        raise refused(403, "CROSS_ORIGIN", f"requests from the origin {origin[:100]!r} are refused")


def _check_content_type(request: web.Request) -> None:
    if request.method in _SAFE_METHODS:
        return
    media_type = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
    is_fine = media_type == "application/json" if request.can_read_body else not _SENT_BY_FORMS.match(media_type)
    if not is_fine:
        message = "a body must be JSON; send it with: content-type: application/json"
        raise refused(415, "UNSUPPORTED_MEDIA_TYPE", message)


def most_bytes(request: web.Request) -> int:
    """That the body may have."""
    return MAX_TENSORS_BYTES if route_of(request) == "/update_weights_from_tensor" else MAX_BODY_BYTES


def _check_size(request: web.Request) -> None:
    """What is announced; aiohttp bounds what comes (client_max_size)."""
    limit = most_bytes(request)
    if (request.content_length or 0) > limit:
        raise refused(413, "PAYLOAD_TOO_LARGE", f"the body exceeds {limit} bytes", close=True)
