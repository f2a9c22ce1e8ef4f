"""Plain connections of the generator, between real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.connection import Connection, Job
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.outcome import CUT, DISCONNECT, OK, Verdict
from pointsman.daemon.bench.sockets import Sockets

TIMEOUT_S = 20.0
DOCUMENT = b'{"choices":[{"text":"x"}]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(DOCUMENT), DOCUMENT)


class Asked:
    """A request on a connection of its own, the peer's end of that, and what became of it."""

    def __init__(self, sockets: Sockets, wire: bytes, ends: tuple[socket.socket, socket.socket] | None = None) -> None:
        ours, self.peer = ends or socket.socketpair()
        self.verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.is_reusable = False
        self.connection = Connection(self)
        sockets.adopt(ours, self.connection)
        self.job = Job(wire, is_stream=False, intended_ns=0, gaps=Histogram(), ended=self.ended)
        self.connection.send(self.job)

    def ended(self, _job: Job, verdict: Verdict, _answer: Answer, _end_ns: int) -> None:
        self.verdict.set_result(verdict)

    def rest(self, connection: Connection) -> None:
        self.is_reusable = True

    def forget(self, connection: Connection) -> None:
        self.is_reusable = False

    async def outcome(self) -> str:
        return (await asyncio.wait_for(self.verdict, TIMEOUT_S)).kind


Ask = Callable[..., Asked]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    sockets = Sockets(asyncio.get_running_loop())
    asked: list[Asked] = []

    def make(wire: bytes = b"GET", ends: tuple[socket.socket, socket.socket] | None = None) -> Asked:
        asked.append(Asked(sockets, wire, ends))
        return asked[-1]

    yield make
    sockets.close()
    for each in asked:
        each.peer.close()


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


async def test_an_answer_comes_in_pieces(ask: Ask) -> None:
    asked = ask()
    assert asked.peer.recv(10) == b"GET"
    for piece in (ANSWER[:5], ANSWER[5:-1]):
        asked.peer.sendall(piece)
        await asyncio.sleep(0)
    assert not asked.verdict.done()
    asked.peer.sendall(ANSWER[-1:])
    assert await asked.outcome() == OK
    assert asked.is_reusable


async def test_what_the_kernel_does_not_take_is_sent_later(ask: Ask) -> None:
    """To a peer that reads slowly; the answer comes behind the last byte."""
    wire = os.urandom(1 << 20) * 8
    asked = ask(wire)
    received = bytearray()

    def read() -> None:
        received.extend(asked.peer.recv(100_000))
        if len(received) == len(wire):
            asked.peer.sendall(ANSWER)

    asked.peer.setblocking(False)
    asyncio.get_running_loop().add_reader(asked.peer, read)
    assert await asked.outcome() == OK
    asyncio.get_running_loop().remove_reader(asked.peer)
    assert received == wire


async def test_an_answer_that_came_before_the_end_of_the_request_is_read(ask: Ask) -> None:
    """A server that refuses a body closes without reading it."""
    asked = ask(bytes(8 << 20))
    asked.peer.sendall(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert await asked.outcome() == "http_413"
    assert not asked.is_reusable


@pytest.mark.parametrize(("sent", "kind"), [(ANSWER[:-1], CUT), (b"", DISCONNECT)])
@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_peer_that_closes(ask: Ask, sent: bytes, kind: str, is_reset: bool) -> None:
    asked = ask()
    if not is_reset:
        asked.peer.recv(10)  # unread bytes at the close are a reset
    asked.peer.sendall(sent)
    asked.peer.close()
    assert await asked.outcome() == kind
    assert asked.connection.is_closed


async def test_a_reset_of_tcp(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = socket.create_connection(server.getsockname()), server.accept()[0]
    asked = ask(ends=ends)
    asked.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    asked.peer.close()
    assert await asked.outcome() == DISCONNECT


async def test_a_connection_may_close_another_that_is_ready(ask: Ask) -> None:
    """Both are in what one call took from the kernel; whichever comes first, the other one hears nothing."""
    pair = [ask(), ask()]
    heard: list[int] = []

    def close_other(number: int) -> None:
        heard.append(number)
        other = pair[1 - number].connection
        other.job = None
        other.close()

    for number, asked in enumerate(pair):
        asked.job.ended = lambda *_, number=number: close_other(number)
    for asked in pair:
        asked.peer.sendall(ANSWER)
    third = ask()
    third.peer.sendall(ANSWER)
    assert await third.outcome() == OK
    assert len(heard) == 1
    assert pair[heard[0]].connection.is_closed is False


async def test_closing_tells_nobody_and_leaves_no_descriptor() -> None:
    before = open_descriptors()
    sockets = Sockets(asyncio.get_running_loop())
    asked = [Asked(sockets, b"GET") for _ in range(3)]
    for each in asked:
        assert each.peer.recv(10) == b"GET"
        each.peer.sendall(ANSWER)
    sockets.close()
    sockets.close()
    await asyncio.sleep(0)
    for each in asked:
        each.connection.close()
        each.peer.close()
        assert not each.verdict.done()
    assert open_descriptors() == before


async def test_a_closed_one_writes_nothing(ask: Ask) -> None:
    asked = ask()
    asked.connection.close()
    asked.connection.close()
    asked.connection.send(asked.job)
    assert asked.peer.recv(10) == b"GET"
    assert asked.peer.recv(10) == b""
