"""The poll with real sockets, a real event loop and real upstream connections; only requests and workers are played."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.config.settings import Settings
from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.relay.framing import BodyFraming, State
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.pace import SAMPLE_EVENTS, Pace
from pointsman.daemon.relay.receiver import Receiver
from pointsman.daemon.relay.upstream import UpstreamConnection, UpstreamPools
from pointsman.daemon.shm import layout as at

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
END = b"0\r\n\r\n"
LONG_S = 20.0
"""no test takes it"""


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(number: int) -> bytes:
    return chunk(b"data: %d\n\n" % number)


FLOOD = chunk(b"x" * 8000) * 500


class Client(asyncio.Protocol):
    """The gateway's side of a client's connection."""

    def __init__(self) -> None:
        self.told: Told | None = None
        self.is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self.is_paused = True
        assert self.told is not None
        self.told.has_paused_upstream = True
        self.told.connection.pause_reading()

    def resume_writing(self) -> None:
        self.is_paused = False
        assert self.told is not None
        self.told.has_paused_upstream = False
        self.told.connection.resume_reading()


class Told(Receiver):
    """What an exchange is for its connection."""

    def __init__(self, connection: UpstreamConnection, client: Client) -> None:
        self.method = b"POST"
        self.usage_data = b""
        self.connection = connection
        self.out = client.transport
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def head_received(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        return self.body_received(framing, data, position)

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        end = framing.feed(data, position)
        self.out.write(data[position:end])
        self.events += 1
        self.bytes_out += end - position
        self.sink = self.out
        return end

    def answer_complete(self) -> None:
        self.ended.set_result("complete")

    def answer_broken(self, reason: str) -> None:
        self.ended.set_result(reason)


class Stream:
    """A worker at one end, a client at the other, the gateway between them."""

    def __init__(self, worker: socket.socket, client: socket.socket, told: Told, gateways_client: Client) -> None:
        self.worker, self.client, self.told, self.gateways_client = worker, client, told, gateways_client

    @property
    def connection(self) -> UpstreamConnection:
        return self.told.connection

    @property
    def poll(self) -> Any:
        return self.connection.pool.pools.poll

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.worker, data)

    async def receive(self, size: int) -> bytes:
        loop, got = asyncio.get_running_loop(), b""
        async with asyncio.timeout(LONG_S):
            while len(got) < size:
                piece = await loop.sock_recv(self.client, size - len(got))
                assert piece
                got += piece
        return got

    async def passes(self, data: bytes) -> None:
        """What the worker says comes to the client."""
        await self.send(data)
        assert await self.receive(len(data)) == data

    async def flood(self, more: bytes = b"") -> asyncio.Task[None]:
        """The worker sends FLOOD, for which there is no room, and more; returns when the client's transport is full."""
        sending = asyncio.create_task(self.send(FLOOD + more))
        await until(lambda: self.gateways_client.is_paused)
        return sending

    async def begin(self) -> None:
        """The stream joins the poll."""
        await self.send(HEAD)
        before, number = len(self.poll), 0
        while len(self.poll) == before:
            await self.passes(event(number))
            number += 1


class AlwaysRounds(Pace):
    def sample(self, now: float) -> bool:
        return True

    def round_over(self, found: int) -> bool:
        return False


class Rig:
    def __init__(self, pace: Pace) -> None:
        self.loop = asyncio.get_running_loop()
        self.counts: Counter[int] = Counter()
        configured = Settings(runtime_dir="", state_dir="")
        context = SimpleNamespace(loop=self.loop, settings=configured, count=self._count)
        self.pools = UpstreamPools(cast(Any, context), pace)
        self.pool = self.pools.of(WorkerSpec("w", "http://127.0.0.1:1", 0, "127.0.0.1", "127.0.0.1", 1))
        self._sockets: list[socket.socket] = []
        self._transports: list[asyncio.Transport] = []

    def _count(self, word: int, amount: int = 1) -> None:
        self.counts[word] += amount

    @property
    def poll(self) -> Any:
        return self.pools.poll

    async def stream(self) -> Stream:
        worker, ours = self._pair()
        connection = UpstreamConnection(self.pool)
        await self.loop.create_unix_connection(lambda: cast(Any, connection), sock=ours)
        client, ours = self._pair()
        gateways_client = Client()
        await self.loop.create_unix_connection(lambda: gateways_client, sock=ours)
        self._transports += (connection.transport, gateways_client.transport)
        told = gateways_client.told = Told(connection, gateways_client)
        connection.send(told, b"GET / HTTP/1.1\r\n\r\n", b"")
        stream = Stream(worker, client, told, gateways_client)
        assert await self.loop.sock_recv(worker, 1000)
        return stream

    async def begin_rounds(self) -> None:
        """Two streams have events in turn, that join no more."""
        streams = [await self.stream() for _ in range(2)]
        for stream in streams:
            await stream.send(HEAD)
        while not self.poll.is_in_rounds:
            for stream in streams:
                if not self.poll.is_in_rounds:
                    await stream.passes(event(0))

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        for one in pair:
            one.setblocking(False)
        self._sockets.append(pair[0])
        return pair

    async def close(self) -> None:
        self.pools.close()
        for transport in self._transports:
            transport.abort()
        for one in self._sockets:
            one.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def rig(pace: Pace | None = None) -> AsyncIterator[Rig]:
    """With rounds of a millisecond that never end, unless a pace is given."""
    pace = pace or AlwaysRounds(0.001)
    made = Rig(pace)
    try:
        if isinstance(pace, AlwaysRounds):
            await made.begin_rounds()
        yield made
    finally:
        await made.close()


def in_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110 - a poll tells nobody
            await asyncio.sleep(0.001)


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@in_uvloop
async def test_a_stream_joins_after_some_events_and_leaves_at_its_end() -> None:
    async with rig() as made:
        stream = await made.stream()
        await stream.send(HEAD)
        for number in range(3):
            await stream.passes(event(number))
        assert len(made.poll) == 0
        for number in range(3, 100):
            await stream.passes(event(number))
        assert len(made.poll) == 1
        await stream.passes(END)
        assert await stream.told.ended == "complete"
        assert len(made.poll) == 0
        assert stream.told.events == 101
        assert stream.told.bytes_out == sum(len(event(number)) for number in range(100)) + len(END)
        assert made.pool.idle == [stream.connection]


@in_uvloop
async def test_the_next_answer_of_the_connection_is_read_again() -> None:
    async with rig() as made:
        stream = await made.stream()
        for _ in range(3):
            await stream.begin()
            await stream.passes(END)
            assert await stream.told.ended == "complete"
            told = stream.gateways_client.told = stream.told = Told(made.pool.idle.pop(), stream.gateways_client)
            stream.connection.send(told, b"GET / HTTP/1.1\r\n\r\n", b"")
            await made.loop.sock_recv(stream.worker, 1000)


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_pass_unchanged_however_they_are_cut(payloads: list[bytes], data: st.DataObject) -> None:
    body = b"".join(map(chunk, payloads)) + END
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=10)))

    async def run() -> None:
        async with rig() as made:
            stream = await made.stream()
            await stream.begin()
            for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
                await stream.passes(body[start:end])
            assert await stream.told.ended == "complete"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@in_uvloop
async def test_many_events_are_read_in_rounds_and_few_by_the_event_loop() -> None:
    async with rig(Pace(0.001)) as made:
        streams = [await made.stream() for _ in range(40)]
        for stream in streams:
            await stream.send(HEAD)

        async def flow(stream: Stream, first: int) -> None:
            number = first
            while len(made.poll) < len(streams) and number < first + 5000:
                await stream.passes(event(number))
                number += 1

        for first in (5, 10_000):
            await asyncio.gather(*(flow(stream, first) for stream in streams))
            assert made.poll.rounds == made.counts[at.G_STREAM_ROUNDS] > 0
            await until(lambda: not made.poll.is_in_rounds)
            assert len(made.poll) == 0
            for stream in streams:
                await stream.passes(event(first))


@in_uvloop
async def test_a_stream_that_is_held_back_stays_so_when_rounds_end() -> None:
    class Ending(AlwaysRounds):
        is_over = False

        def round_over(self, found: int) -> bool:
            return self.is_over

    pace = Ending(0.001)
    async with rig(pace) as made:
        stream = await made.stream()
        await stream.begin()
        sending = await stream.flood()
        pace.is_over = True
        await until(lambda: not made.poll.is_in_rounds)
        assert not stream.connection.transport.is_reading()
        assert await stream.receive(len(FLOOD)) == FLOOD
        await sending
        await stream.passes(event(1))


@in_uvloop
async def test_events_that_came_meanwhile_are_passed_on_together() -> None:
    """One read and one write for each stream."""
    async with rig() as made:
        streams = [await made.stream() for _ in range(20)]
        for stream in streams:
            await stream.begin()
        before = [stream.told.events for stream in streams]
        for stream in streams:
            for number in range(100):
                stream.worker.send(event(number))  # the loop stands still: no round comes between
        for stream, events in zip(streams, before, strict=True):
            async with asyncio.timeout(LONG_S):
                got = await made.loop.sock_recv(stream.client, 1 << 20)
            assert got == b"".join(map(event, range(100)))
            assert stream.told.events - events == 100


@in_uvloop
async def test_one_stream_alone_is_not_many() -> None:
    async with rig(Pace(0.02)) as made:
        stream, other = await made.stream(), await made.stream()
        await stream.send(HEAD)
        for number in range(10 * SAMPLE_EVENTS):
            await stream.passes(event(number))
        assert not made.poll.is_in_rounds
        await other.send(HEAD)
        while not made.poll.is_in_rounds:
            await stream.passes(event(1))
            await other.passes(event(1))


@in_uvloop
async def test_a_client_that_does_not_read_stops_its_stream_alone() -> None:
    async with rig() as made:
        slow, other = await made.stream(), await made.stream()
        await slow.begin()
        await other.begin()
        sending = await slow.flood()
        for number in range(100):
            await other.passes(event(number))
        assert not sending.done()
        assert await slow.receive(len(FLOOD)) == FLOOD
        await sending
        await slow.passes(END)
        assert await slow.told.ended == "complete"


class Hoarding:
    """A transport that keeps what its socket did not take when it was written."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        self.kept = b""

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def get_write_buffer_size(self) -> int:
        return len(self.kept)

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        with suppress(BlockingIOError):
            if not self.kept:
                data = data[os.write(self._socket.fileno(), data) :]
        self.kept += data


@in_uvloop
async def test_nothing_overtakes_what_the_transport_keeps() -> None:
    async with rig() as made:
        stream = await made.stream()
        sink = Hoarding(stream.told.out)
        stream.told.out = cast(asyncio.Transport, sink)
        await stream.begin()
        before = stream.told.bytes_out
        await stream.send(FLOOD)
        await until(lambda: stream.told.bytes_out - before == len(FLOOD))
        taken = len(FLOOD) - len(sink.kept)
        assert await stream.receive(taken) == FLOOD[:taken]
        kept = sink.kept
        await stream.send(event(1))
        await until(lambda: sink.kept == kept + event(1))
        sink.kept = b""
        await stream.passes(event(2))


@in_uvloop
async def test_bytes_stay_in_order_when_a_client_reads_by_fits_and_starts() -> None:
    async with rig() as made:
        stream, rng = await made.stream(), Random(1)
        await stream.begin()
        events = [chunk(rng.randbytes(rng.randint(1, 3000))) for _ in range(5_000)]
        body = b"".join(events)

        async def send() -> None:
            for one in events:
                await stream.send(one)
                await asyncio.sleep(0)

        async def receive() -> bytes:
            got = b""
            while len(got) < len(body):
                got += await stream.receive(min(rng.randint(1, 400_000), len(body) - len(got)))
                for _ in range(rng.randint(0, 200)):
                    await asyncio.sleep(0)
            return got

        _, got = await asyncio.gather(send(), receive())
        assert got == body


@in_uvloop
async def test_an_answer_that_ends_while_its_client_does_not_read() -> None:
    async with rig() as made:
        stream = await made.stream()
        await stream.begin()
        sending = await stream.flood(END)
        assert await stream.receive(len(FLOOD + END)) == FLOOD + END
        await sending
        assert await stream.told.ended == "complete"
        assert stream.connection.transport.is_reading()


@in_uvloop
async def test_a_worker_that_ends_in_the_middle_is_noticed() -> None:
    async with rig() as made:
        stream = await made.stream()
        await stream.begin()
        stream.worker.close()
        assert "closed the connection in the middle" in await asyncio.wait_for(stream.told.ended, LONG_S)
        assert len(made.poll) == 0


@in_uvloop
async def test_nonsense_in_a_stream_is_noticed() -> None:
    async with rig() as made:
        stream = await made.stream()
        await stream.begin()
        await stream.send(b"zz\r\n")
        assert "bad chunk size" in await asyncio.wait_for(stream.told.ended, LONG_S)


@in_uvloop
async def test_a_stream_that_is_abandoned_leaves_nothing_open() -> None:
    async with rig() as made:
        kept = await made.stream()
        await kept.begin()
        before = open_descriptors()
        streams = [await made.stream() for _ in range(10)]
        for stream in streams:
            await stream.begin()
        assert len(made.poll) == 11
        for stream in streams:
            stream.connection.abandon()
            stream.told.out.abort()
            stream.worker.close()
            stream.client.close()
        assert len(made.poll) == 1
        await until(lambda: open_descriptors() <= before)
        await kept.passes(event(1))


@in_uvloop
async def test_a_stream_may_end_others_that_are_read_with_it() -> None:
    async with rig() as made:
        streams = [await made.stream() for _ in range(5)]
        first, *others = streams

        class Ending(Told):
            def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
                if data.startswith(b"5\r\nhel"):
                    for stream in others:
                        stream.connection.abandon()
                return super().body_received(framing, data, position)

        first.told = first.gateways_client.told = Ending(first.connection, first.gateways_client)
        first.connection.send(first.told, b"GET / HTTP/1.1\r\n\r\n", b"")
        for stream in streams:
            await stream.begin()
        failures: list[dict[str, Any]] = []
        made.loop.set_exception_handler(lambda loop, failure: failures.append(failure))
        rounds = made.poll.rounds
        await until(lambda: made.poll.rounds > rounds + 3)  # nobody rests from a read any more
        first.worker.send(b"5\r\nhel")
        for stream in others:
            stream.worker.send(event(1))
        assert await first.receive(6) == b"5\r\nhel"
        assert len(made.poll) == 1
        for stream in others:
            with pytest.raises(BlockingIOError):
                stream.client.recv(1)
        assert not failures


@in_uvloop
async def test_a_defect_ends_its_own_stream_alone() -> None:
    async with rig() as made:
        bad, good = await made.stream(), await made.stream()

        class Failing(Told):
            def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
                if data == b"5":
                    raise ZeroDivisionError
                return super().body_received(framing, data, position)

        bad.told = bad.gateways_client.told = Failing(bad.connection, bad.gateways_client)
        bad.connection.send(bad.told, b"GET / HTTP/1.1\r\n\r\n", b"")
        await bad.begin()
        await good.begin()
        failures: list[dict[str, Any]] = []
        made.loop.set_exception_handler(lambda loop, failure: failures.append(failure))
        await bad.send(b"5")
        assert await asyncio.wait_for(bad.told.ended, LONG_S) != "complete"
        assert isinstance(failures[0]["exception"], ZeroDivisionError)
        await good.passes(event(1))


@in_uvloop
async def test_without_coalescing_no_stream_joins() -> None:
    async with rig(Pace(0)) as made:
        stream = await made.stream()
        await stream.send(HEAD)
        for number in range(200):
            await stream.passes(event(number))
        assert len(made.poll) == made.poll.rounds == 0


@in_uvloop
async def test_token_counts_are_kept() -> None:
    async with rig() as made:
        stream = await made.stream()
        await stream.begin()
        usage = chunk(b'data: {"usage":{"completion_tokens":7}}\n\n')
        await stream.passes(usage)
        await stream.passes(event(1))
        assert stream.told.usage_data == usage


@in_uvloop
async def test_without_descriptors_streams_stay_with_the_event_loop() -> None:
    for is_open in (False, True):
        async with rig(Pace(0.02)) as made:
            streams = [await made.stream() for _ in range(3)]
            for stream in streams:
                await stream.send(HEAD)
            if is_open:
                await made.begin_rounds()
            with no_more_descriptors():
                for number in range(2 * SAMPLE_EVENTS):
                    for stream in streams:
                        await stream.passes(event(number))
            assert len(made.poll) == 0
            assert made.poll.is_in_rounds == is_open


@in_uvloop
async def test_a_client_that_has_gone_is_no_defect() -> None:
    async with rig() as made:
        stream = await made.stream()
        await stream.begin()
        failures: list[dict[str, Any]] = []
        made.loop.set_exception_handler(lambda loop, failure: failures.append(failure))
        stream.client.close()
        stream.told.out.abort()
        await stream.send(event(1))
        rounds = made.poll.rounds
        await until(lambda: made.poll.rounds > rounds + 5)
        assert not failures


@in_uvloop
async def test_an_encrypted_connection_stays_with_the_event_loop() -> None:
    async with rig() as made:
        stream = await made.stream()
        plain, secured = stream.told.out, SimpleNamespace(get_extra_info=lambda name: name)
        for source, sink in ((plain, secured), (secured, plain)):
            stream.told.sink = cast(asyncio.Transport, sink)
            framing = BodyFraming(State.CHUNK_SIZE)
            assert made.poll.join(stream.connection, stream.told, framing, cast(asyncio.Transport, source)) is None
        assert len(made.poll) == 0
