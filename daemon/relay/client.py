"""A client's connection: requests in, answers out, in order.

One request is served at a time; what a client pipelines behind it waits, parsed, in a short queue. The connection
stays readable while a request is served, since that is how a client that leaves is noticed; only a full queue or a
full body buffer stops the reading.

Deadlines are kept by `check_deadlines`, called once a second for every connection, not by a timer for each request.

llhttp sees every byte of a head and of a chunked body. A long body of known length goes past it: llhttp would only
count its bytes, and httptools copy them. What was fed until then belongs to that request, or llhttp would have begun
another one, so the next bytes are the body's. Since llhttp cannot be told of them, the next head gets a new parser.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from hmac import compare_digest
from math import inf
from typing import TYPE_CHECKING, Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from pointsman.daemon.errors import (
    RequestError,
    batches_off,
    buffers_full,
    head_too_large,
    malformed_http,
    method_not_allowed,
    not_found,
    not_internal,
    payload_too_large,
    request_timeout,
    too_many_connections,
)
from pointsman.daemon.relay import local
from pointsman.daemon.relay.access import MAX_LOGGED_PATH, short_line
from pointsman.daemon.relay.answers import CONTINUE, JSON, error_body, render
from pointsman.daemon.relay.ending import Ending
from pointsman.daemon.relay.exchange import Exchange
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.pair_probe import METHOD as PROBE_METHOD
from pointsman.daemon.relay.pair_probe import make_pair_probe
from pointsman.daemon.relay.passage import Passage
from pointsman.daemon.relay.request_lines import is_http_1_1, whole_head
from pointsman.daemon.relay.routed import Caller
from pointsman.daemon.relay.routes import (
    HEALTH_GENERATE,
    MODELS_PREFIX,
    NOWHERE,
    ONE_MODEL,
    PAIR_PROBE,
    Kind,
    Route,
    batch_route,
)
from pointsman.daemon.resilience.timeouts import DEADLINES, Deadline
from pointsman.daemon.routing.body import scan
from pointsman.daemon.routing.request import NO_FEATURES, decoded_features, form_features, form_models
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext

MAX_PIPELINED = 16
_JSON, _FORM, _INFO, _LOCAL, _STREAMED = Kind
_COMPLETE, _REFUSED = Ending.COMPLETE, Ending.REFUSED
_DURATION, _G_REQUESTS = at.KIND_DURATION, at.G_REQUESTS
LONG_BODY_BYTES = 16384
"""What is missing of a body that goes past the parser, at least. To copy less costs less than a new parser (0.4 µs)."""
_LONG_BODY_BYTES = LONG_BODY_BYTES
LINGER_S = 5.0
"""how long a refused client's rest is read and thrown away, so that it can read why (a reset would eat the answer)"""


class ClientConnection(Caller):
    """An asyncio.Protocol; the transport asks for nothing but its methods."""

    def __init__(self, context: ShardContext) -> None:
        self.context = context
        self.peer = ""
        self.peer_bytes = b""
        self._parser = HttpRequestParser(self)
        self._request: Inbound | None = None
        self._queue: list[Inbound] = []
        self._head_bytes = 0
        self._body_left = 0
        """what is missing of a body that goes past the parser"""
        self._reading_since = 0.0
        self._linger_until = 0.0
        self._is_reading_paused = False
        self._waits_for_buffer = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._answer_left: bytes | None = None

    # --- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        context = self.context
        address = transport.get_extra_info("peername")
        self.peer = address[0] if address else ""
        self.peer_bytes = self.peer.encode()
        self._reading_since = context.now()
        context.connections.add(self)
        context.count(at.G_CONNECTIONS)
        limit = context.settings.max_connections
        if limit and context.segment.gauge_total(at.G_CONNECTIONS) > limit:
            self._refuse(too_many_connections())

    def data_received(self, data: bytes) -> None:
        if self._linger_until:
            return
        self._reading_since = self.context.now()
        self._head_bytes += len(data)
        self._feed(data)
        request = self._request
        if request is None or request.is_head_complete:
            self._head_bytes = 0
        elif self._head_bytes > self.context.max_header_bytes:
            self._refuse(head_too_large())
        if self._queue:
            self._advance()
            if len(self._queue) >= MAX_PIPELINED:
                self._pause_reading()

    def _feed(self, data: bytes) -> None:
        while data:
            if self._body_left:
                data = self._take_body(data, 0)
                continue
            head = b""
            if self._request is None:
                # Asking the parser for the version of every request costs more than to see it where the first line ends
                self._is_1_1 = is_http_1_1(data)
                if len(data) >= _LONG_BODY_BYTES:
                    head = whole_head(data)
            if not head:
                self._parse(data)
                return
            if not self._parse(head):
                self._parse(data[len(head) :])
                return
            data = self._take_body(data, len(head))

    def _parse(self, data: bytes) -> bool:
        """Whether what follows is a body that goes past the parser.

        llhttp stops after a message that asks for an upgrade; we never upgrade, so the rest is the next request.
        """
        while data and not self._linger_until:
            try:
                self._parser.feed_data(data)
                break
            except HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._parser = HttpRequestParser(self)
            except HttpParserError as error:
                self._refuse(malformed_http(f"malformed HTTP request: {error}"))
        request = self._request
        if request is None or not self._goes_past_parser(request):
            return False
        self._body_left = request.missing_bytes()
        self._parser = HttpRequestParser(self)
        return True

    def _goes_past_parser(self, request: Inbound) -> bool:
        """Not if the connection ends with it: llhttp refuses what a client sends behind such a request."""
        return request.keep_alive and not request.is_streamed and request.missing_bytes() >= _LONG_BODY_BYTES

    def _take_body(self, data: bytes, start: int) -> bytes:
        """`data` has the next bytes of the body, from `start` on. Returns what follows the body."""
        request = self._request
        assert request is not None
        size = min(self._body_left, len(data) - start)
        end = start + size
        rest = b""
        if end < len(data):
            rest, data, start = data[end:], data[start:end], 0
        self._body_left -= size
        self._keep_body(request, data, start)
        if not self._body_left:
            self.on_message_complete()
        return rest

    def eof_received(self) -> None:
        return None  # half-closed is left: the worker's time is too dear to find out

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        context = self.context
        context.connections.discard(self)
        context.count(at.G_CONNECTIONS, -1)
        if self._request is not None:
            self.release_body(self._request)
            self._request = None
        for request in self._queue:
            self.release_body(request)
        self._queue.clear()
        if self.exchange is not None:
            self.exchange.client_left()

    def pause_writing(self) -> None:
        self.is_write_paused = True
        if self.exchange is not None:
            self.exchange.pause_upstream()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self.exchange is not None:
            self.exchange.resume_upstream()

    # --- parser

    def on_message_begin(self) -> None:
        if not self._linger_until:
            self._request = Inbound(self.context.now())

    def on_url(self, url: bytes) -> None:
        if self._request is not None:
            self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._request
        if request is not None:
            request.add_header(name, value)

    def on_headers_complete(self) -> None:
        request = self._request
        if request is None:
            return
        parser = self._parser
        context = self.context
        try:
            if request.header_count() > context.max_headers:
                raise malformed_http(f"more than {context.max_headers} headers", status=431)
            if self._head_bytes > context.max_header_bytes < request.head_size():
                raise head_too_large()
            version = "1.1" if self._is_1_1 else parser.get_http_version()
            self._is_1_1 = False
            request.finish_head(parser.get_method(), version, parser.should_keep_alive())
            if context.elsewhere is not None:
                request.is_streamed = self._is_streamed(request.path)
            most = inf if request.is_streamed else context.max_payload_bytes
            if request.content_length is not None and request.content_length > most:
                raise payload_too_large(context.max_payload_bytes)
            if request.internal_token is not None:
                self._recognize(request)
            guard = context.guard
            if guard is not None:  # before the body: whoever may not ask fills no buffer
                guard.admit(request, context.table(), self.peer)
        except RequestError as error:
            request.is_streamed = False  # nothing of it has begun: its answer is queued as any other
            self._refuse(error)
            return
        if request.is_streamed:
            self._queue.append(request)  # served before its body is there
        elif request.expects_continue and self.exchange is None and not self._queue:
            self.send_continue(request)

    def _is_streamed(self, path: bytes) -> bool:
        elsewhere = self.context.elsewhere
        return elsewhere is not None and path not in self.context.routes and elsewhere.route(path) is not None

    def _recognize(self, request: Inbound) -> None:
        """Raises RequestError when it is not one of ours that asks."""
        if not compare_digest(request.internal_token or b"", self.context.internal_token):
            raise not_internal()
        request.is_internal = True

    def on_body(self, chunk: bytes) -> None:
        request = self._request
        if request is None:
            return
        if request.is_streamed:
            self._stream(request, chunk)
            return
        self._keep_body(request, chunk, 0)

    def _keep_body(self, request: Inbound, data: bytes, start: int) -> None:
        context = self.context
        request.expects_continue = False
        request.add_body(data, start)
        context.buffers.take(len(data) - start)
        if request.body_size > context.max_payload_bytes:
            self._refuse(payload_too_large(context.max_payload_bytes))
        elif not self._waits_for_buffer and context.buffers.is_full():
            self._waits_for_buffer = True
            self._pause_reading()
            context.buffers.wait(self)

    def on_message_complete(self) -> None:
        request = self._request
        if request is not None:
            self._request = None
            request.is_complete = True
            if not request.is_streamed:
                self._queue.append(request)
            elif (passage := self._passage_of(request)) is not None:
                passage.body_complete()

    # --- bodies that are streamed

    def _stream(self, request: Inbound, chunk: bytes) -> None:
        passage = self._passage_of(request)
        if passage is not None:
            passage.body(chunk)
        else:
            self.keep_for_later(request, chunk)
            self.hold_body()  # others are served first

    def keep_for_later(self, request: Inbound, chunk: bytes) -> None:
        """What has been read already when its turn has not come: never more than one read."""
        request.add_body(chunk)
        self.context.buffers.take(len(chunk))

    def _passage_of(self, request: Inbound) -> Passage | None:
        exchange = self.exchange
        return exchange if isinstance(exchange, Passage) and exchange.request is request else None

    def hold_body(self) -> None:
        """Nothing more is read until `resume_body`."""
        self._waits_for_buffer = True
        self._pause_reading()

    @property
    def is_body_held(self) -> bool:
        return self._waits_for_buffer

    # --- body buffers

    def resume_body(self) -> None:
        self._waits_for_buffer = False
        self._resume_reading()

    def give_up_body(self) -> None:
        self._waits_for_buffer = False
        if not self.is_closed and self._request is not None:
            self._refuse(buffers_full())
        self._resume_reading()

    def release_body(self, request: Inbound) -> None:
        """The body is not needed any more; may be said more than once."""
        self.context.buffers.give(request.drop_body())

    def hold(self, request: Inbound, more_bytes: int) -> None:
        """Besides its body so much is kept for the request, until the body is released."""
        self.context.buffers.take(request.hold(more_bytes))

    def _pause_reading(self) -> None:
        if not self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and not self._waits_for_buffer and not self.is_closed:
            self._is_reading_paused = False
            self._reading_since = self.context.now()
            self.transport.resume_reading()

    # --- serving

    def _refuse(self, error: RequestError) -> None:
        """What is being read is not acceptable: answer in its turn, then close; nothing more of it is parsed."""
        request = self._request or Inbound(self.context.now())
        self._request = None
        request.error = error
        request.keep_alive = False
        self._linger_until = self.context.now() + LINGER_S
        if not request.is_streamed:
            self._queue.append(request)
        elif (passage := self._passage_of(request)) is not None:
            passage.fail(error)
        self._advance()

    def _advance(self) -> None:
        """Serve what is queued, in order, until a request has to wait for its worker."""
        while self.exchange is None and self._queue and not self.is_closed:
            request = self._queue[0]
            del self._queue[0]
            self._serve(request)
        waiting = self._request
        if waiting is not None and waiting.expects_continue and self.exchange is None and waiting.is_head_complete:
            self.send_continue(waiting)

    def write_soon(self, answer: bytes) -> None:
        self._answer_left = answer
        self.context.answer_soon(self)

    def write_answer(self) -> None:
        """What `write_soon` was given, if it is not written yet: before anything else may be."""
        answer, self._answer_left = self._answer_left, None
        if answer is not None and not self.is_closed:
            self.transport.write(answer)

    def send_continue(self, request: Inbound) -> None:
        self.write_answer()
        request.expects_continue = False
        self.transport.write(CONTINUE)

    def _serve(self, request: Inbound) -> None:
        self.write_answer()
        if not request.request_id:
            request.request_id = self.context.new_request_id()
        route = NOWHERE
        try:
            if request.error is not None:
                raise request.error
            route = self._route(request)
            if route.kind is _LOCAL:
                self._answer(request, route, *local.answer(self.context, request, route))
            elif route.kind is _STREAMED:
                self._pass_on(request, route)
            else:
                self._exchange(request, route)
        except RequestError as error:
            keep_alive = self.write_error(request, error)
            self._done(request, route, error.status, keep_alive)

    def _route(self, request: Inbound) -> Route:
        route = self.context.routes.get(request.path)
        if route is None:
            if not request.path.startswith(MODELS_PREFIX):
                return self._route_elsewhere(request)
            route = ONE_MODEL
        if request.method not in route.methods:
            raise method_not_allowed(request.method.decode("latin-1"), route.allowed)
        return route

    def _route_elsewhere(self, request: Inbound) -> Route:
        elsewhere = self.context.elsewhere
        route = None if elsewhere is None else elsewhere.route(request.path)
        if route is not None:
            return route
        if batch_route(request.path) is not None:
            raise batches_off()
        raise not_found(request.text_path[:MAX_LOGGED_PATH])

    def _pass_on(self, request: Inbound, route: Route) -> None:
        assert self.context.elsewhere is not None
        passage = self.exchange = Passage(self, request, route, self.context.elsewhere.destination(route))
        self.context.count(_G_REQUESTS)
        passage.start()

    def _exchange(self, request: Inbound, route: Route) -> None:
        if route.kind is _JSON:
            read = request.read_with_body()
            features = scan(read, request.body_start) or decoded_features(read[request.body_start :])
        elif route.kind is _FORM:
            features = form_features(request.body())
        elif route.path == HEALTH_GENERATE and self.context.table().has_pairs:
            self.release_body(request)
            features = make_pair_probe(request, self.context.table())
            route = PAIR_PROBE
        else:
            features = NO_FEATURES
        if request.key is not None and route.kind is not _INFO:
            request.key.check_model(features.model)
            if route.kind is _FORM:
                for model in form_models(request.body()):
                    request.key.check_model(model)
        exchange = self.exchange = Exchange(self, request, route, features, self.context.table())
        self.context.count(_G_REQUESTS)
        if route is PAIR_PROBE:
            exchange.method = PROBE_METHOD
        if route.kind is _INFO:
            exchange.start_any()
        else:
            exchange.start()

    def _answer(self, request: Inbound, route: Route, status: int, body: bytes, content_type: bytes) -> None:
        keep_alive = request.keep_alive and not self.context.closes_connections()
        self.transport.write(
            render(
                status,
                body,
                content_type=content_type,
                request_id=request.request_id,
                keep_alive=keep_alive,
                is_http_1_0=request.is_http_1_0,
                is_head=request.method == b"HEAD",
            )
        )
        self._done(request, route, status, keep_alive)

    def write_error(self, request: Inbound, error: RequestError, headers: tuple[tuple[str, str], ...] = ()) -> bool:
        """Returns whether the connection stays open."""
        keep_alive = request.keep_alive and not error.close and not self.context.closes_connections()
        if not self.is_closed:
            self.transport.write(
                render(
                    error.status,
                    error_body(error),
                    content_type=JSON,
                    request_id=request.request_id,
                    keep_alive=keep_alive,
                    is_http_1_0=request.is_http_1_0,
                    is_head=request.method == b"HEAD",
                    headers=error.headers + headers,
                )
            )
        return keep_alive

    def _done(self, request: Inbound, route: Route, status: int, keep_alive: bool) -> None:
        """A request that was answered without a worker."""
        context = self.context
        now = context.now()
        context.series.count(route.label, 0, status)
        context.series.observe(route.label, _DURATION, now - request.started)
        if request.key is not None:
            context.key_counts.count(request.key.label, status)
        ending = _REFUSED if status >= 400 else _COMPLETE
        if context.is_line_due(status, ending):
            context.log_line(short_line(context, self.peer, request, status, ending, now - request.started))
        self.release_body(request)
        if not keep_alive:
            self._close(not request.is_complete)

    def exchange_ended(self, request: Inbound, is_keep_alive: bool) -> None:
        """Called once by every exchange, after its answer (or the reason for none) was written."""
        self.exchange = None
        self.context.count(_G_REQUESTS, -1)
        self.release_body(request)
        if self.is_closed:
            return
        if request.is_streamed:
            self._request = None if self._request is request else self._request
            self.resume_body()
        if not is_keep_alive:
            self._close(not request.is_complete)
            return
        self._reading_since = self.context.now()
        if self._queue or self._request is not None:
            self.context.loop.call_soon(self._next)

    def _next(self) -> None:
        if self.is_closed:
            return
        self._advance()
        if len(self._queue) < MAX_PIPELINED:
            self._resume_reading()

    def _close(self, is_lingering: bool) -> None:
        """Flush and close; a client that is still sending first gets the chance to read the answer."""
        self.write_answer()
        while self._queue:
            self.release_body(self._queue.pop(0))
        if is_lingering and not self.is_closed:
            self._linger_until = self.context.now() + LINGER_S
            self._resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
        else:
            self.transport.close()

    # --- deadlines, shutdown

    @property
    def is_idle(self) -> bool:
        return self.exchange is None and self._request is None and not self._queue and self._answer_left is None

    def close_if_idle(self, now: float, idle_s: float) -> None:
        """The next request of a client that was answered a moment ago may be on its way: it is waited for."""
        if self.is_idle and not self.is_closed and now - self._reading_since > idle_s:
            self.transport.close()

    def check_deadlines(self, now: float) -> None:
        settings = self.context.settings
        request = self._request
        if self.exchange is not None:
            return  # it has deadlines of its own
        if self._linger_until:
            if now > self._linger_until:
                self.transport.abort()
        elif request is None:
            if now - self._reading_since > settings.keep_alive_timeout_s:
                self.transport.close()
        elif not request.is_head_complete:
            if now - request.started > settings.header_timeout_s:
                self._refuse(request_timeout("request head"))
        elif not self._waits_for_buffer:
            timeout_s = self.context.table().early_plan(request.profile).timeouts.client_body_s
            if timeout_s and now - self._reading_since > timeout_s:
                self.context.count(at.G_TIMEOUTS + DEADLINES.index(Deadline.CLIENT_BODY))
                self._refuse(request_timeout("request body"))

    # --- tasks

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The connection holds its tasks: nothing is collected while it runs, nothing outlives the shard unseen."""
        task = self.context.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.transport.abort()  # a defect of ours: end the client's wait, let the loop's handler tell
            task.result()
