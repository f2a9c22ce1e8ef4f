"""Connections to workers: one request in flight on each, kept open between requests, per worker and shard.

An upstream connection is handed to one exchange (any `Receiver`), tells it what arrives, and goes back to its pool only
when the message ended exactly where its framing says, the worker keeps the connection open, and all of the request was
sent. Any anomaly ends the connection.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import orjson

from pointsman.config.snapshot import WorkerSpec
from pointsman.config.tls_contexts import WorkerTrust
from pointsman.daemon.relay.framing import BodyFraming, FramingError
from pointsman.daemon.relay.heads import HeadError, ResponseHead, end_of_head, framing_of, parse_response_head
from pointsman.daemon.relay.pace import Pace
from pointsman.daemon.relay.receiver import Receiver
from pointsman.daemon.relay.stream_poll import Polled, StreamPoll
from pointsman.daemon.relay.usage import holds_counts
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.decisions import key_of
from pointsman.daemon.shm.native import monotonic

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext

MAX_HEAD_BYTES = 65536
REFUSED = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class UpstreamConnection:
    """An asyncio.Protocol; the transport asks for nothing but its methods."""

    def __init__(self, pool: UpstreamPool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.exchange: Receiver | None = None
        self.framing: BodyFraming | None = None
        self.is_reused = False
        self.idle_since = 0.0
        self._buffer = b""
        self._head: ResponseHead | None = None
        self._outgoing: list[bytes | memoryview] = []
        self._polled: Polled | None = None
        self._is_left_to_loop = False
        """the answer that runs cannot be polled"""

    # --- from the exchange

    def send(self, exchange: Receiver, head: bytes, body: bytes | memoryview) -> None:
        self.exchange = exchange
        self._is_left_to_loop = False
        self.framing = None
        self._head = None
        self._outgoing = [head, body] if body else [head]
        self.pool.pools.send_soon(self)

    def flush(self) -> None:
        """Write what `send` was given."""
        outgoing, self._outgoing = self._outgoing, []
        if self.exchange is not None and not self.transport.is_closing():
            self.transport.writelines(outgoing)

    def abandon(self) -> None:
        """The exchange wants nothing more of this answer: the worker sees its connection closed."""
        self._let_go()
        self.transport.abort()

    def pause_reading(self) -> None:
        if self._polled is None:
            self.transport.pause_reading()
        else:
            self.pool.pools.poll.hold(self._polled)

    def resume_reading(self) -> None:
        if self._polled is None:
            self.transport.resume_reading()
        else:
            self.pool.pools.poll.release(self._polled)

    def set_aside(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> None:
        """The exchange does not want this answer; if all of it is here the connection can be used again."""
        self._let_go()
        try:
            end = framing.feed(data, position)
        except FramingError:
            self.transport.abort()
            return
        is_whole = framing.is_done and end == len(data) and head.keeps_alive
        if is_whole and self.transport.get_write_buffer_size() == 0:
            self.pool.put(self)
        else:
            self.transport.abort()

    def _let_go(self) -> None:
        """Of the request, however it ended."""
        self.exchange = None
        if self._polled is not None:
            self.pool.pools.poll.leave(self._polled)
            self._polled = None

    # --- from the poll

    def read_by_loop(self) -> None:
        """Again."""
        exchange = self.exchange
        if self._polled is not None:
            self.pool.pools.poll.leave(self._polled)
            self._polled = None
        if exchange is None or not exchange.has_paused_upstream:
            self.transport.resume_reading()

    # --- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.pool.context.count(at.G_UPSTREAM_CONNECTIONS)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # a worker that speaks unasked: nothing it says could be assigned to a request
            self.transport.abort()
            return
        framing = self.framing
        if framing is not None and exchange.sink is not None:
            chunks = framing.take_chunks(data)
            if chunks:
                exchange.bytes_out += len(data)
                exchange.events += chunks
                if holds_counts(data):
                    exchange.usage_data = data
                exchange.sink.write(data)
                if not self._is_left_to_loop and self.pool.pools.poll.event_passed(exchange):
                    self._join_poll(exchange, framing)
                return
        try:
            if framing is None:
                self._head_received(exchange, data)
                return
            end = exchange.body_received(framing, data, 0)
            if self.exchange is None:
                return  # it was not taken
        except HeadError as error:
            exchange.answer_broken(str(error))
            return
        except FramingError as error:
            if self.framing is not None:
                self.framing.spoil()
            exchange.answer_broken(str(error))
            return
        if framing.is_done:
            self._message_done(exchange, end < len(data))

    def _join_poll(self, exchange: Receiver, framing: BodyFraming) -> None:
        if self.exchange is not None and not exchange.has_paused_upstream:
            self._polled = self.pool.pools.poll.join(self, exchange, framing, self.transport)
            self._is_left_to_loop = self._polled is None

    def _head_received(self, exchange: Receiver, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        start = 0
        while True:
            end = end_of_head(data, start, len(data))
            if not end:
                if len(data) - start > MAX_HEAD_BYTES:
                    raise HeadError("the worker's response head is too long")
                self._buffer = data[start:]
                return
            head = parse_response_head(data, start, end)
            if head.status >= 200:
                break
            if head.status == 101:
                raise HeadError("the worker switches protocols unasked")
            exchange.interim_received(head)
            start = end
        self._head = head
        framing = self.framing = framing_of(head, exchange.method)
        end = exchange.head_received(head, framing, data, end)
        if self.exchange is not None and framing.is_done:
            self._message_done(exchange, end < len(data))

    def _message_done(self, exchange: Receiver, has_surplus: bool) -> None:
        head, transport = self._head, self.transport
        assert head is not None
        may_reuse = head.keeps_alive and not has_surplus and transport.get_write_buffer_size() == 0
        is_paused = exchange.has_paused_upstream or self._polled is not None
        self._let_go()
        if is_paused:
            transport.resume_reading()
        if may_reuse:
            self.pool.put(self)
        else:
            transport.abort()
        exchange.answer_complete()

    def eof_received(self) -> None:
        return None  # the transport closes; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.context.count(at.G_UPSTREAM_CONNECTIONS, -1)
        self.pool.discard(self)
        exchange = self.exchange
        self._let_go()
        if exchange is None:
            return
        framing = self.framing
        if framing is not None and framing.ends_with_connection and exc is None:
            exchange.answer_complete()
        elif framing is None and not self._buffer:
            exchange.closed_unanswered(self.is_reused)
        else:
            exchange.answer_broken("the worker closed the connection in the middle of its answer")

    def pause_writing(self) -> None:
        pass  # a request body is complete in memory and bounded there; nothing to hold back

    def resume_writing(self) -> None:
        pass


class UpstreamPool:
    """Idle connections to one worker, last used first."""

    def __init__(self, pools: UpstreamPools, context: ShardContext, worker: WorkerSpec) -> None:
        self.pools = pools
        self.context = context
        self.worker = worker
        self._idle_timeout_s = context.settings.pool_idle_timeout_s
        self._max_idle = context.settings.pool_max_idle
        self.idle: list[UpstreamConnection] = []
        self.is_closed = False
        self.key = key_of(worker.id)
        self.url_json = orjson.dumps(worker.url)
        # what every request to this worker repeats, in wire form
        self.authority = _authority(worker)
        self.base_path = worker.base_path.encode()
        self.authorization = None if worker.api_key is None else b"Bearer " + worker.api_key.encode()
        self._worker_line = b"X-Pointsman-Worker: %b\r\n" % worker.id.encode()
        if context.settings.target_pod_header:
            self._worker_line += b"Target-Pod: %b\r\n" % _host_and_port(worker)
        if context.settings.routed_worker_header:
            self._worker_line += b"X-Smg-Routed-Worker-Id: %b\r\n" % worker.url.encode()
        self._identity = b""
        self._identity_of = -1

    def identity(self, generation: int) -> bytes:
        """The answer's header lines that say who answered, under which generation."""
        if self._identity_of != generation:
            self._identity_of = generation
            self._identity = self._worker_line + b"X-Pointsman-Generation: %d\r\n" % generation
        return self._identity

    def take(self) -> UpstreamConnection | None:
        oldest = monotonic() - self._idle_timeout_s
        while self.idle:
            connection = self.idle.pop()
            if connection.idle_since >= oldest and not connection.transport.is_closing():
                connection.is_reused = True
                return connection
            connection.transport.abort()
        return None

    def put(self, connection: UpstreamConnection) -> None:
        if self.is_closed or len(self.idle) >= self._max_idle:
            connection.transport.abort()
            return
        connection.idle_since = monotonic()
        self.idle.append(connection)

    def discard(self, connection: UpstreamConnection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def close_idle(self, before: float) -> None:
        """Close what has been idle since before `before`; the oldest come first."""
        stale = 0
        for connection in self.idle:
            if connection.idle_since >= before:
                break
            stale += 1
        for connection in self.idle[:stale]:
            connection.transport.abort()
        del self.idle[:stale]

    def close(self) -> None:
        self.is_closed = True
        self.close_idle(float("inf"))

    async def connect(self, timeout_s: float) -> UpstreamConnection:
        """Within `timeout_s`, 0 = however long it takes. Raises OSError (TimeoutError and ssl.SSLError included)."""
        worker = self.worker
        connection: UpstreamConnection
        async with asyncio.timeout(timeout_s or None):
            _, connection = await self.context.loop.create_connection(
                lambda: cast(Any, UpstreamConnection(self)), worker.address, worker.port, **self.secure()
            )
        return connection

    def secure(self) -> dict[str, Any]:
        """What a connection to the worker needs besides its address."""
        if not self.worker.tls:
            return {}
        return {"ssl": self.context.upstreams.trust.context(), "server_hostname": self.worker.host}


def _bracketed(worker: WorkerSpec) -> str:
    return f"[{worker.host}]" if ":" in worker.host else worker.host


def _host_and_port(worker: WorkerSpec) -> bytes:
    return f"{_bracketed(worker)}:{worker.port}".encode()


def _authority(worker: WorkerSpec) -> bytes:
    default = 443 if worker.tls else 80
    return _bracketed(worker).encode() if worker.port == default else _host_and_port(worker)


class UpstreamPools:
    def __init__(self, context: ShardContext, pace: Pace) -> None:
        self._context = context
        self._pools: dict[str, UpstreamPool] = {}
        self.trust = WorkerTrust(lambda: context.table().snapshot.worker_ca)
        self.poll = StreamPoll(context.loop, pace, self._round_began)
        self._sending: list[UpstreamConnection] = []
        self._call_soon, self._flush = context.loop.call_soon, self._send_all  # looked up once
        self._last: UpstreamPool | None = None
        """who was asked for last, which is asked for again until its request has ended"""

    def _round_began(self) -> None:
        self._context.count(at.G_STREAM_ROUNDS)

    def send_soon(self, connection: UpstreamConnection) -> None:
        """Requests of one turn of the event loop go out together, when all that had arrived is parsed.

        Written one by one, each would wake a worker that has just gone to sleep again: measured, half of what a
        short request costs in the kernel.
        """
        if not self._sending:
            self._call_soon(self._flush)
        self._sending.append(connection)

    def send_now(self) -> None:
        """What `send_soon` was given."""
        self._send_all()

    def _send_all(self) -> None:
        sending, self._sending = self._sending, []
        for connection in sending:
            connection.flush()

    def of(self, worker: WorkerSpec) -> UpstreamPool:
        pool = self._last
        if pool is not None and pool.worker is worker and not pool.is_closed:
            return pool
        pool = self._last = self._named(worker)
        return pool

    def _named(self, worker: WorkerSpec) -> UpstreamPool:
        pool = self._pools.get(worker.id)
        if pool is None or (pool.worker is not worker and pool.worker != worker):
            if pool is not None:
                pool.close()
            pool = self._pools[worker.id] = UpstreamPool(self, self._context, worker)
        return pool

    def keep_only(self, workers: Iterable[WorkerSpec]) -> None:
        """Forget the pools of workers that are gone; their running requests end undisturbed."""
        live = {worker.id for worker in workers}
        for gone in self._pools.keys() - live:
            self._pools.pop(gone).close()

    def close(self) -> None:
        self.poll.close()

    def close_idle(self, before: float) -> None:
        for pool in self._pools.values():
            pool.close_idle(before)
