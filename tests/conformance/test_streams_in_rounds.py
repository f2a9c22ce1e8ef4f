"""Many streams at once on two shards, read in rounds: each client gets its own bytes, all of them, in order."""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from operator import le

from pointsman.daemon.shm import layout as at
from tests.fakes.data_plane import DataPlane, data_plane
from tests.fakes.leeway import leeway

STREAMS = 60
EVENTS = 150
GAP_S = (0.001, 0.004)
LIMIT_S = 60.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

Send = Callable[[asyncio.StreamWriter, list[bytes]], Awaitable[None]]


def events(name: bytes) -> list[bytes]:
    payloads = [b"data: %b %d\n\n" % (name, number) for number in range(EVENTS)]
    return [b"%x\r\n%b\r\n" % (len(payload), payload) for payload in payloads]


async def send_all(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(random.uniform(*GAP_S))  # the engine's pace is what is tested


@asynccontextmanager
async def engine(send: Send) -> AsyncIterator[str]:
    """Answers each request by a stream of events that have the request's name; `send` says how."""

    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                assert length is not None
                body = await reader.readexactly(int(length[1]))
                name = re.search(rb"stream-\d+", body)
                assert name is not None
                await send(writer, [HEAD, *events(name[0]), END])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*running)  # the gateway is gone, and with it their connections


class Ask:
    """A client's connection with one stream on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: bytes) -> None:
        self._reader, self._writer = reader, writer
        self._name = name
        self.wanted = b"".join(events(name)) + END

    async def start(self) -> None:
        body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%b"}]}' % self._name
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._writer.write(head + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head

    async def read(self, size: int | None = None) -> bytes:
        """Of the answer; all of it, as long as it should be, or what there is before the connection ends."""
        try:
            return await self._reader.readexactly(size or len(self.wanted))
        except asyncio.IncompleteReadError as error:
            return error.partial

    async def leave(self) -> None:
        self._writer.transport.abort()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def ask(plane: DataPlane, number: int) -> Ask:
    asked = Ask(*await asyncio.open_connection(*plane.address), b"stream-%d" % number)
    await asked.start()
    return asked


async def ask_all(plane: DataPlane) -> list[Ask]:
    return await asyncio.gather(*(ask(plane, number) for number in range(STREAMS)))


async def read_all(asked: list[Ask]) -> list[bytes]:
    return await asyncio.gather(*(stream.read() for stream in asked))


async def leave_all(asked: list[Ask]) -> None:
    await asyncio.gather(*(stream.leave() for stream in asked))


def descriptors(plane: DataPlane) -> list[int]:
    return [len(os.listdir(f"/proc/{process.pid}/fd")) for process in plane.processes]  # noqa: PTH208


def rounds(plane: DataPlane) -> int:
    return plane.segment.gauge_total(at.G_STREAM_ROUNDS)


async def test_every_client_gets_its_own_stream_again_and_again() -> None:
    async with asyncio.timeout(LIMIT_S * leeway()), engine(send_all) as one, engine(send_all) as other:
        with data_plane(2, [one, other]) as plane:
            for _ in range(2):
                before = rounds(plane)
                asked = await ask_all(plane)
                for stream, got in zip(asked, await read_all(asked), strict=True):
                    assert got == stream.wanted
                assert rounds(plane) > before
                # the same connections once more: they were the event loop's again
                await asyncio.gather(*(stream.start() for stream in asked))
                for stream, got in zip(asked, await read_all(asked), strict=True):
                    assert got == stream.wanted
                await leave_all(asked)


async def test_clients_that_leave_take_nothing_from_the_others() -> None:
    async with asyncio.timeout(LIMIT_S * leeway()), engine(send_all) as one, engine(send_all) as other:
        with data_plane(2, [one, other], pool_max_idle=0) as plane:
            before = descriptors(plane)
            asked = await ask_all(plane)
            leaving, staying = asked[::2], asked[1::2]

            async def leave_in_the_middle(stream: Ask) -> None:
                got = await stream.read(random.randint(100, 1000))
                assert stream.wanted.startswith(got)
                await stream.leave()

            _, answers = await asyncio.gather(asyncio.gather(*map(leave_in_the_middle, leaving)), read_all(staying))
            for stream, got in zip(staying, answers, strict=True):
                assert got == stream.wanted
            assert rounds(plane)
            await leave_all(staying)
            most = [count + 2 for count in before]  # what the poll opens once
            while plane.in_flight() or not all(map(le, descriptors(plane), most)):  # noqa: ASYNC110 - shards tell nobody
                await asyncio.sleep(0.01)


async def test_workers_that_break_take_nothing_from_the_others() -> None:
    async def break_off(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
        await send_all(writer, pieces[: EVENTS // 2])
        writer.transport.abort()

    async with asyncio.timeout(LIMIT_S * leeway()), engine(send_all) as one, engine(break_off) as other:
        with data_plane(2, [one, other]) as plane:
            asked = await ask_all(plane)
            broken = 0
            for stream, got in zip(asked, await read_all(asked), strict=True):
                if got == stream.wanted:
                    continue
                broken += 1
                text, reason = got.split(b'data: {"error"')
                right = text[: text.rindex(b"\n", 0, -2) + 1]  # without the size of the last chunk
                assert stream.wanted.startswith(right)
                assert EVENTS // 4 < right.count(b"data: ") < EVENTS
                assert reason.endswith(b"\n\n\r\n"), "no end of the answer follows"
            assert 0 < broken < STREAMS
            assert rounds(plane)
            await leave_all(asked)


async def test_without_coalescing_there_are_no_rounds() -> None:
    async with asyncio.timeout(LIMIT_S * leeway()), engine(send_all) as one:
        with data_plane(2, [one], stream_coalesce_us=0) as plane:
            asked = await ask_all(plane)
            for stream, got in zip(asked, await read_all(asked), strict=True):
                assert got == stream.wanted
            assert rounds(plane) == 0
            await leave_all(asked)
