"""The listener's context: each handshake under what is in force at its begin, and known until it is over."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from pointsman.config.tls_contexts import server_context
from pointsman.config.tls_files import load_tls
from pointsman.daemon.relay.listener_tls import ListenerTls
from tests.fakes.certificates import Authority


class Bench:
    """A server's end that asks the listener's context, and a client's; no socket between them."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.now = 100.0
        self.in_force = self.fresh()
        self.tls = ListenerTls(lambda: self.in_force, lambda: self.now)

    def fresh(self) -> ssl.SSLContext:
        pair = self.authority.issue()
        return server_context(load_tls(pair.certificate, pair.key, None))

    def connection(self) -> tuple[ssl.SSLObject, ssl.SSLObject]:
        """(server's end, client's end)"""
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = self.authority.client_context().wrap_bio(down, up, server_hostname="localhost")
        return self.tls.wrap_bio(up, down, server_side=True), client


def shake(ends: tuple[ssl.SSLObject, ssl.SSLObject]) -> None:
    waiting = list(ends)[::-1]
    while waiting:
        end = waiting.pop(0)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(end)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_new_certificate_counts_from_the_next_handshake_on(bench: Bench) -> None:
    before = bench.connection()
    bench.in_force = bench.fresh()
    after = bench.connection()
    shake(after)
    shake(before)
    shown = [client.getpeercert(binary_form=True) for _, client in (before, after)]
    assert shown[0] != shown[1]


def test_handshakes_are_known_until_they_are_over(bench: Bench) -> None:
    assert not bench.tls.has_handshakes(since=0.0)
    ends = bench.connection()
    assert bench.tls.has_handshakes(since=99.0)
    assert not bench.tls.has_handshakes(since=100.0), "it has had its time"
    shake(ends)
    assert not bench.tls.has_handshakes(since=0.0)


def test_a_handshake_that_was_given_up_is_forgotten(bench: Bench) -> None:
    ends = bench.connection()
    assert bench.tls.has_handshakes(since=0.0)
    del ends
    assert not bench.tls.has_handshakes(since=0.0)


def test_without_a_certificate_there_is_no_session() -> None:
    def nothing() -> ssl.SSLContext:
        raise ssl.SSLError("no certificate")

    with pytest.raises(ssl.SSLError):
        ListenerTls(nothing, lambda: 0.0).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
