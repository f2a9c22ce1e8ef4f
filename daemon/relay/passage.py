"""A request that another process of ours answers (files, batches, fan-outs), streamed to its unix socket and back.

Nothing of the body is kept: what the client sends goes on as it comes, and while the other side does not read, neither
do we. The same holds for the answer. So an upload of any size costs a shard two socket buffers.

To the client's connection it is what an `Exchange` is: it ends exactly once, by `_end`.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, cast

from pointsman.daemon.errors import RequestError, no_worker, request_timeout, worker_timeout
from pointsman.daemon.relay.access import short_line
from pointsman.daemon.relay.answers import LAST_CHUNK
from pointsman.daemon.relay.elsewhere import Destination
from pointsman.daemon.relay.ending import CLIENT_CLOSED_REQUEST, Ending
from pointsman.daemon.relay.framing import BodyFraming, FramingError
from pointsman.daemon.relay.heads import (
    HeadError,
    ResponseHead,
    client_head,
    framing_of,
    parse_response_head,
    request_head,
)
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.routes import Route
from pointsman.daemon.relay.wheel import Armed
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.client import ClientConnection

LOOK_S = 1.0
MAX_HEAD_BYTES = 65536


class Passage(Armed):
    def __init__(self, client: ClientConnection, request: Inbound, route: Route, destination: Destination) -> None:
        self.client = client
        self.context = client.context
        self.request = request
        self.route = route
        self.is_keep_alive = False
        self.is_ended = False
        self._destination = destination
        self._status = 0
        """of the answer, once its head is out"""
        self._far: _FarSide | None = None
        self._is_chunked = request.has_body and request.content_length is None
        self._is_body_sent = False
        self._progress_at = self.context.now()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.hold_body()  # until there is somebody to give it to
        self.context.wheel.arm(self, self.context.now() + LOOK_S)
        self._task = self.client.spawn(self._connect())

    async def _connect(self) -> None:
        context = self.context
        try:
            async with asyncio.timeout(context.settings.connect_timeout_s):
                _, far = await context.loop.create_unix_connection(lambda: _FarSide(self), self._destination.socket)
        except OSError:
            self._task = None
            self.fail(self._destination.unavailable())
            return
        self._task = None
        if self.is_ended:
            far.transport.abort()
            return
        self._far = far
        self._send_head(far)
        if self.request.expects_continue:
            self.client.send_continue(self.request)
        held = self.request.body()
        self.client.release_body(self.request)
        if held:
            self.body(held)
        if self.request.is_complete:
            self.body_complete()
        self.resume_body()

    def _send_head(self, far: _FarSide) -> None:
        request = self.request
        lines = request.passing_lines() + b"Connection: close\r\nX-Pointsman-Peer: %b\r\n" % self.client.peer_bytes
        if request.key is not None:
            lines += b"X-Pointsman-Key: %b\r\n" % request.key.name.encode()
        if self._is_chunked:
            lines += b"Transfer-Encoding: chunked\r\n"
        size = request.content_length
        authorization = request.authorization
        far.transport.write(
            request_head(request.method, request.target, b"localhost", lines, authorization, size, request.request_id)
        )

    # --- the request's body

    def body(self, chunk: bytes) -> None:
        far = self._far
        self._progress_at = self.context.now()
        if self.is_ended:
            return
        if far is None:
            self.client.keep_for_later(self.request, chunk)  # what came in one read with the head
        elif self._is_chunked:
            far.transport.writelines([b"%x\r\n" % len(chunk), chunk, b"\r\n"])
        else:
            far.transport.write(chunk)

    def body_complete(self) -> None:
        if self._far is not None and not self._is_body_sent and not self.is_ended:
            self._is_body_sent = True
            if self._is_chunked:
                self._far.transport.write(LAST_CHUNK)

    def hold_body(self) -> None:
        if not self.request.is_complete:
            self.client.hold_body()

    def resume_body(self) -> None:
        self._progress_at = self.context.now()
        if not self.is_ended:
            self.client.resume_body()

    # --- the answer

    def head_received(self, head: ResponseHead, framing: BodyFraming) -> None:
        request = self.request
        self._status = head.status
        is_unchunked = head.is_chunked and request.is_http_1_0
        self.is_keep_alive = (
            request.keep_alive
            and request.is_complete
            and not framing.ends_with_connection
            and not is_unchunked
            and not self.context.closes_connections()
        )
        own = b"X-Request-Id: %b\r\n" % request.request_id
        out = client_head(head, is_http_1_0=request.is_http_1_0, keep_alive=self.is_keep_alive, own_headers=own)
        self.client.transport.write(out)
        if self.client.is_write_paused:
            self.pause_upstream()

    def data_received(self, pieces: list[bytes]) -> None:
        self._progress_at = self.context.now()
        self.client.transport.writelines(pieces)

    def answer_complete(self) -> None:
        self._far = None
        self._end(self._status, Ending.COMPLETE)

    def answer_broken(self) -> None:
        self._far = None
        self.fail(self._destination.unavailable())

    # --- what else can happen

    def client_left(self) -> None:
        self.context.count(at.G_CLIENT_DISCONNECTS)
        self._end(self._status or CLIENT_CLOSED_REQUEST, Ending.CLIENT_LEFT)

    def pause_upstream(self) -> None:
        if self._far is not None:
            self._far.transport.pause_reading()

    def resume_upstream(self) -> None:
        self._progress_at = self.context.now()
        if self._far is not None:
            self._far.transport.resume_reading()

    def look(self, now: float) -> float:
        """The wheel asks whether somebody has stood still for too long; returns when to ask again."""
        timeouts = self.context.table().early_plan(None).timeouts
        if self.client.is_write_paused:
            limit_s, error = timeouts.client_read_s, request_timeout("reading of the answer")
        elif self.request.is_complete or self.client.is_body_held:
            limit_s = self._destination.answer_s
            error = worker_timeout(f"no answer within {limit_s:g} s")
        else:
            limit_s, error = timeouts.client_body_s, request_timeout("request body")
        if limit_s and now - self._progress_at > limit_s:
            self.fail(error, Ending.TIMEOUT)
        return math.inf if self.is_ended else now + LOOK_S

    def shut_down(self) -> None:
        """The daemon's grace is over."""
        self.fail(no_worker("the gateway is shutting down"), Ending.SHUTDOWN)

    def fail(self, error: RequestError, ending: Ending = Ending.REFUSED) -> None:
        """An answer that is under way is broken off, so that nobody takes it for complete."""
        if self.is_ended:
            return
        if self._status:
            self.is_keep_alive = False
            self.client.transport.abort()
        else:
            self.request.keep_alive = self.request.keep_alive and self.request.is_complete
            self.is_keep_alive = self.client.write_error(self.request, error)
        self._end(self._status or error.status, ending)

    def _end(self, status: int, ending: Ending) -> None:
        if self.is_ended:
            return
        self.is_ended = True
        context = self.context
        context.wheel.disarm(self)
        far, self._far = self._far, None
        if far is not None:
            far.abandon()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        took_s = context.now() - self.request.started
        context.series.count(self.route.label, 0, status)
        context.series.observe(self.route.label, at.KIND_DURATION, took_s)
        if context.is_line_due(status, ending):
            context.log_line(short_line(context, self.client.peer, self.request, status, ending, took_s))
        self.client.exchange_ended(self.request, self.is_keep_alive)


class _FarSide(asyncio.Protocol):
    """The connection to the other process: one request, then its end."""

    def __init__(self, passage: Passage) -> None:
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._passage: Passage | None = passage
        self._framing: BodyFraming | None = None
        self._head = b""
        self._is_unchunked = passage.request.is_http_1_0

    def abandon(self) -> None:
        self._passage = None
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._passage is None:
            return
        try:
            if self._framing is None:
                data = self._read_head(self._passage, data)
            self._pass_on(self._passage, data)
        except (HeadError, FramingError):
            self._broken()

    def _read_head(self, passage: Passage, data: bytes) -> bytes:
        """Returns what follows it; b"" while it is not whole."""
        data = self._head + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > MAX_HEAD_BYTES:
                raise HeadError("the response head is too long")
            self._head = data
            return b""
        head = parse_response_head(data[:end])
        if head.status < 200:  # ours to send; the client's `Expect` was answered when the connection was there
            self._head = b""
            return self._read_head(passage, data[end:])
        self._framing = framing_of(head, passage.request.method)
        passage.head_received(head, self._framing)
        return data[end:]

    def _pass_on(self, passage: Passage, data: bytes) -> None:
        framing = self._framing
        if framing is None:
            return
        if data:
            pieces: list[bytes] = []
            end = framing.feed(data, 0, pieces if self._is_unchunked else None)
            passage.data_received(pieces if self._is_unchunked else [data[:end]])
        if framing.is_done:
            self._passage = None
            self.transport.abort()
            passage.answer_complete()

    def _broken(self) -> None:
        passage, self._passage = self._passage, None
        self.transport.abort()
        if passage is not None:
            passage.answer_broken()

    def eof_received(self) -> None:
        return None  # the transport closes; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        passage, self._passage = self._passage, None
        if passage is None:
            return
        if self._framing is not None and self._framing.ends_with_connection and exc is None:
            passage.answer_complete()
        else:
            passage.answer_broken()

    def pause_writing(self) -> None:
        if self._passage is not None:
            self._passage.hold_body()

    def resume_writing(self) -> None:
        if self._passage is not None:
            self._passage.resume_body()
