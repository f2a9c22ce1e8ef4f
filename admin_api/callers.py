"""Who asks, and what they may: every route needs a scope, every caller has one, and each scope includes those below it.

    read      look at everything that the admin API shows
    operate   run what is there: drain, pause, reload, flush, record; nothing that adds, removes or changes for good
    admin     everything

A route that is not named here needs the scope admin (but GET): forgetting one is safe.
"""

from __future__ import annotations

import pwd
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from aiohttp import web

from pointsman.admin_api import peers
from pointsman.admin_api.answers import refused


class Scope(IntEnum):
    READ = 1
    OPERATE = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Caller:
    name: str
    """Of the token, or `user:NAME` at the other end of the unix socket."""
    scope: Scope


CALLER: Final = web.RequestKey("caller", Caller)

_READ: Final = frozenset({("POST", "/explain")})
_OPERATE: Final = frozenset(
    {
        ("POST", "/workers/{key}/drain"),
        ("POST", "/workers/{key}/undrain"),
        ("POST", "/workers/{key}/forget"),
        ("POST", "/config/reload"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/record"),
        ("DELETE", "/record"),
        ("POST", "/state/snapshot"),
        ("PUT", "/log-level"),
        ("POST", "/flush_cache"),
        ("POST", "/abort_request"),
        ("POST", "/pause_generation"),
        ("POST", "/continue_generation"),
        ("POST", "/release_memory_occupation"),
        ("POST", "/resume_memory_occupation"),
        ("POST", "/start_profile"),
        ("POST", "/stop_profile"),
    }
)


def needed(method: str, route: str) -> Scope:
    """`route`: as it is registered."""
    if method in ("GET", "HEAD") or (method, route) in _READ:
        return Scope.READ
    return Scope.OPERATE if (method, route) in _OPERATE else Scope.ADMIN


def route_of(request: web.Request) -> str | None:
    """As it is registered, an engine operation by its name; None: there is no such route."""
    resource = request.match_info.route.resource
    if resource is None:
        return None
    operation = request.match_info.get("operation")
    return f"/{operation}" if operation is not None else resource.canonical


def authorize(request: web.Request, caller: Caller) -> None:
    """Raises RequestError 403."""
    route = route_of(request)
    if route is None:
        return  # it is answered 404 or 405
    scope = needed(request.method, route)
    if caller.scope < scope:
        mine, wanted = caller.scope.name.lower(), scope.name.lower()
        raise refused(403, "SCOPE", f"{caller.name} may {mine}; {request.method} {route} needs the scope {wanted}")


def local_caller(request: web.Request) -> Caller:
    """Whoever could connect to the unix socket, or to a listener that asks nobody."""
    uid = peers.user_of(request)
    return Caller("anyone" if uid is None else f"user:{_user_name(uid)}", Scope.ADMIN)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
