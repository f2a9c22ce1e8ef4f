"""At a request's head: who may ask, what of its headers counts, and what goes on to the worker."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from pointsman.config.settings import Settings
from pointsman.config.snapshot import KeySpec, Snapshot
from pointsman.daemon.errors import RequestError
from pointsman.daemon.relay.guard import Guard
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.routing.table import RoutingTable

KEY = b"sk-pm-0123456789"
BEARER = (b"Authorization", b"Bearer " + KEY)
STEERING = [
    (b"Routing-Strategy", b"random"),
    (b"config-profile", b"chat"),
    (b"external-filter", b"rack=b"),
    (b"x-smg-target-worker", b"w0"),
    (b"x-smg-routing-key", b"k"),
    (b"x-pointsman-explain", b"1"),
]
OTHERS = [(b"X-Session-Id", b"s"), (b"user", b"me"), (b"Content-Type", b"application/json"), (b"x-more", b"1")]


def guard(*, has_keys: bool = True, **fields: Any) -> Guard:
    return Guard(Settings(runtime_dir="", state_dir="", api_key_file="keys.json" if has_keys else None, **fields))


def table(**fields: Any) -> RoutingTable:
    key = KeySpec("a", hashlib.sha256(KEY).digest(), **fields)
    return RoutingTable(Snapshot(1, keys=(key,), key_names=("", "a")))


def inbound(*headers: tuple[bytes, bytes], path: bytes = b"/v1/completions") -> Inbound:
    request = Inbound(0.0)
    request.target = path
    for name, value in ((b"Host", b"gateway"), *headers):
        request.add_header(name, value)
    request.finish_head(b"POST", "1.1", keep_alive=True)
    return request


def passing(request: Inbound) -> list[bytes]:
    return sorted(line.partition(b":")[0].lower() for line in request.passing_lines().splitlines())


# --- keys


@pytest.mark.parametrize(
    "headers",
    [
        [BEARER],
        [(b"X-API-Key", KEY)],
        [BEARER, (b"x-api-key", KEY)],
        [BEARER, (b"x-api-key", b"something else")],
        [(b"authorization", b"Basic abc"), (b"x-api-key", KEY)],
        [(b"x-api-key", KEY), (b"Connection", b"x-more, close")],
    ],
    ids=repr,
)
def test_a_key_lets_in_and_stays_here(headers: list[tuple[bytes, bytes]]) -> None:
    request = inbound(*OTHERS, *headers)
    guard().admit(request, table(), "10.0.0.1")
    assert request.key is not None
    assert request.key.name == "a"
    assert request.authorization is None
    sent = request.passing_lines().lower()
    assert b"key" not in sent
    assert KEY not in sent
    assert b"something else" not in sent
    assert {b"content-type", b"user", b"x-session-id"} <= set(passing(request))


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ([], "this needs an API key"),
        ([(b"Authorization", b"Bearer sk-wrong")], "not one of this gateway's"),
        ([(b"x-api-key", b"sk-wrong")], "not one of this gateway's"),
        ([(b"Authorization", KEY)], "not one of this gateway's"),
    ],
)
def test_others_are_told_what_is_missing(headers: list[tuple[bytes, bytes]], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        guard().admit(inbound(*headers), table(), "10.0.0.1")
    error = caught.value
    assert (error.status, error.code, error.close) == (401, "invalid_api_key", True)
    assert error.headers == (("WWW-Authenticate", "Bearer"),)
    assert b"sk-wrong".decode() not in error.message


def test_probes_need_no_key() -> None:
    for path in (b"/health", b"/liveness", b"/readiness?x=1"):
        guard().admit(inbound(path=path), table(), "10.0.0.1")
    for path in (b"/v1/models", b"/health/", b"/version", b"/"):
        with pytest.raises(RequestError):
            guard().admit(inbound(path=path), table(), "10.0.0.1")


def test_a_generation_without_keys_lets_nobody_in() -> None:
    """The first one, before control has published any; and a file whose last key was deleted."""
    for snapshot in (Snapshot(0), Snapshot(1, keys=())):
        with pytest.raises(RequestError):
            guard().admit(inbound(BEARER), RoutingTable(snapshot), "10.0.0.1")


def test_without_a_key_file_both_headers_are_the_workers() -> None:
    assert not guard(has_keys=False).is_needed
    request = inbound(BEARER, (b"X-API-Key", b"theirs"))
    assert request.authorization == b"Bearer " + KEY
    assert request.passing_lines() == b"X-Api-Key: theirs\r\n"


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key"])
def test_two_of_a_kind_are_refused(name: bytes) -> None:
    with pytest.raises(RequestError, match="more than one"):
        inbound((name, b"Bearer a"), (name.title(), b"Bearer b"))


def test_a_keys_user_is_not_what_the_client_says() -> None:
    request = inbound(BEARER, (b"user", b"somebody else"))
    guard().admit(request, table(user="acme"), "10.0.0.1")
    assert request.header_map()["user"] == "acme"


def test_one_of_ours_asks_in_the_name_of_a_key() -> None:
    """And for itself without one; a name that a client sends is nothing."""
    for name, found in ((b"a", "a"), (None, None)):
        request = inbound(*([(b"X-Pointsman-Key", name)] if name else []))
        request.is_internal = True
        guard().admit(request, table(), "127.0.0.1")
        assert (request.key and request.key.name) == found
    gone = inbound((b"X-Pointsman-Key", b"gone"))
    gone.is_internal = True
    for request in (gone, inbound((b"X-Pointsman-Key", b"a"))):
        with pytest.raises(RequestError) as caught:
            guard().admit(request, table(), "127.0.0.1")
        assert caught.value.status == 401


# --- routing headers


def steered(request: Inbound) -> bool:
    return request.profile is not None or request.wants_explanation or b"routing-strategy" in passing(request)


@pytest.mark.parametrize(
    ("networks", "flag", "peer", "may"),
    [
        (("0.0.0.0/0", "::/0"), None, "8.8.8.8", True),
        (("0.0.0.0/0", "::/0"), False, "127.0.0.1", False),
        (("10.0.0.0/8",), None, "10.1.2.3", True),
        (("10.0.0.0/8",), None, "::ffff:10.1.2.3", True),
        (("10.0.0.0/8",), None, "11.1.2.3", False),
        (("10.0.0.0/8",), True, "11.1.2.3", True),
        (("10.0.0.0/8",), False, "10.1.2.3", False),
        (("fd00::/8",), None, "fd00::1%eth0", True),
        (("fd00::/8",), None, "fe80::1", False),
        ((), None, "127.0.0.1", False),
        ((), True, "127.0.0.1", True),
        (("10.0.0.0/8",), None, "", False),
    ],
)
def test_who_may_steer(networks: tuple[str, ...], flag: bool | None, peer: str, may: bool) -> None:
    request = inbound(*STEERING, *OTHERS, BEARER)
    guard(routing_header_networks=networks).admit(request, table(may_steer=flag), peer)
    assert steered(request) is may
    refusing = guard(routing_header_networks=networks, routing_headers_denied="refuse")
    if may:
        refusing.admit(inbound(*STEERING, BEARER), table(may_steer=flag), peer)
        return
    with pytest.raises(RequestError) as caught:
        refusing.admit(inbound(*STEERING, BEARER), table(may_steer=flag), peer)
    assert (caught.value.status, caught.value.code) == (403, "routing_header_not_allowed")
    assert all(name.decode().lower() in caught.value.message for name, _ in STEERING)


def test_what_is_ignored_is_gone_and_nothing_else_is() -> None:
    request = inbound(*STEERING, *OTHERS, BEARER)
    guard(routing_header_networks=()).admit(request, table(), "10.0.0.1")
    assert passing(request) == sorted(name.lower() for name, _ in OTHERS)
    assert request.has_routing_headers, "the session is still the client's to name"
    assert not any(name.decode().lower() in request.header_map() for name, _ in STEERING)


def test_who_a_client_is_is_no_routing_header() -> None:
    request = inbound(*OTHERS, BEARER)
    guard(routing_header_networks=(), routing_headers_denied="refuse").admit(request, table(), "10.0.0.1")
    assert passing(request) == sorted(name.lower() for name, _ in OTHERS)


def test_networks_count_without_keys_too() -> None:
    open_guard = guard(has_keys=False, routing_header_networks=("127.0.0.0/8",))
    assert open_guard.is_needed
    request = inbound(*STEERING, BEARER)
    open_guard.admit(request, RoutingTable(Snapshot(1)), "10.0.0.1")
    assert not steered(request)
    assert request.authorization == b"Bearer " + KEY
