"""One routed request, from the pick to the end of its answer.

Theory of operation. An exchange is in one of four phases, and leaves the last one exactly once:

    start ──> connecting ──> waiting (sent, no head yet) ──> answering ──> ended
                  │                   │                          │
                  └───── fail(error): the client gets an error ──┘ cut(error): the client's stream is ended as broken

Whatever happens, in whatever order (the answer ends, the worker breaks, the client leaves, a deadline passes), the
booking is released, the request is counted and logged in `_end`, and nowhere else.

What is answered is the worker's own bytes. Once the head is out, an error can only be told by breaking the stream: a
cut stream never ends as if it were complete (no final chunk, no `[DONE]`), see `cut`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import StrEnum
from math import nan
from typing import TYPE_CHECKING

import orjson

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.dispatch.router import Ask
from pointsman.daemon.errors import RequestError, bad_answer, connect_failed, model_not_found, no_worker, worker_timeout
from pointsman.daemon.relay.access import path_json
from pointsman.daemon.relay.answers import error_event
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.heads import ResponseHead, client_head, request_head
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.lines import request_line
from pointsman.daemon.relay.routes import Route
from pointsman.daemon.relay.upstream import REFUSED, UpstreamConnection
from pointsman.daemon.relay.usage import CARRY_BYTES, NO_USAGE, TOKENS, read_usage
from pointsman.daemon.routing.picking import REASONS
from pointsman.daemon.routing.request import Features
from pointsman.daemon.routing.table import Plan, Pool, RoutingTable, strategy_line
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import Booked
from pointsman.daemon.shm.decisions import UNKNOWN
from pointsman.daemon.shm.recording import Taken

if TYPE_CHECKING:
    from pointsman.daemon.relay.client import ClientConnection

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; it exists in logs and metrics only"""
SMALL_WRITE_BYTES = 16384
MAX_EXPLANATION_HEADER = 6144
"""bytes; clients read heads of 8 KiB at least"""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Ending(StrEnum):
    """Who ended a request, for the access log."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """answered by us with an error"""
    WORKER_BROKE = "worker_broke"
    CLIENT_LEFT = "client_left"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"


_ENDINGS = {ending: ending.encode() for ending in Ending}


class Exchange:
    # what a request does not set costs nothing: defaults live on the class
    plan: Plan | None = None
    worker: WorkerSpec | None = None
    booked: Booked | None = None
    """what is charged for it now"""
    decision: Booked | None = None
    """what was charged last"""
    taken: Taken | None = None
    """for whoever records the traffic"""
    asked_strategy = ""
    usage = NO_USAGE
    usage_data = b""
    """the last piece of the answer that holds token counts"""
    events = 0
    upstream: UpstreamConnection | None = None
    head: ResponseHead | None = None
    """of the answer, once it was passed on"""
    framing: BodyFraming | None = None
    status = 0
    resends = 0
    bytes_out = 0
    connected_at = 0.0
    first_byte_at = 0.0
    is_keep_alive = False
    is_ended = False
    has_paused_upstream = False
    write_raw: Callable[[bytes], None] | None = None
    """how an event goes to the client once the answer is under way, if its bytes go as they are"""
    _is_unchunked = False
    _task: asyncio.Task[None] | None = None

    def __init__(
        self, client: ClientConnection, request: Inbound, route: Route, features: Features, table: RoutingTable
    ) -> None:
        self.client = client
        self.context = client.context
        self.request = request
        self.route = route
        self.features = features
        self.table = table
        self.method = request.method

    @property
    def deadline(self) -> float:
        return self.request.started + self.context.settings.request_timeout_s

    # --- choosing

    def start(self) -> None:
        try:
            pool = self._pool()
            router = self.context.router
            prompt_tokens = router.read_prompt(self.features)
            plan = self._plan(prompt_tokens)
            now = self.context.now()
            if self._is_plain(pool, plan, now):
                booked = router.choose_least_cost(self.features, self.request.body_size, pool, plan, prompt_tokens, now)
            else:
                booked = router.choose(self._ask(plan, now), self.table, pool, plan, prompt_tokens, now)
            self._book(booked)
            if self.context.cells[at.H_RECORDING]:
                self.taken = self.context.recording.begin(router.chain, self.request.started)
        except RequestError as error:
            self.fail(error)
            return
        self.features.prompt = ()  # spans of the body, which may go as soon as an answer comes
        self._send()

    def start_any(self) -> None:
        """For questions that any healthy worker answers (`/version`)."""
        try:
            self._book(self.context.router.choose_any(self.table.everyone))
        except RequestError as error:
            self.fail(error)
            return
        self._send()

    def _pool(self) -> Pool:
        pool = self.table.pool_for(self.features.model)
        if pool is None:
            raise model_not_found(self.features.model)
        return pool

    def _plan(self, prompt_tokens: int) -> Plan:
        request, features = self.request, self.features
        plan, is_known = self.table.plan_for(
            request.profile, features.model, self.route.path, request.header, prompt_tokens, features.max_tokens
        )
        if not is_known:
            self.context.count(at.G_PROFILE_FALLBACKS)
        self.plan = plan
        return plan

    def _is_plain(self, pool: Pool, plan: Plan, now: float) -> bool:
        """Whether nothing but prompt, loads and costs decides, and nobody wants to know why: nearly always."""
        request = self.request
        return (
            plan.expected_cost is not None
            and not (request.has_routing_headers or request.wants_explanation or pool.has_buckets)
            and now < self.context.next_sample
        )

    def _ask(self, plan: Plan, now: float) -> Ask:
        request, context = self.request, self.context
        wants_explanation = context.is_sample_due(now)
        if request.wants_explanation and context.may_explain(self.client.peer):
            wants_explanation = True
        headers = None
        if plan.expected_cost is None or request.has_routing_headers:
            headers = request.header_map()
            self.asked_strategy = plan.selection.asked_in(headers)
        return Ask(self.features, request.body_size, headers, wants_explanation)

    def _book(self, booked: Booked) -> None:
        self.booked = self.decision = booked
        self.worker = booked.worker

    def _unbook(self, now: float, output_tokens: int | None, *, was_computed: bool) -> None:
        booked, self.booked = self.booked, None
        if booked is not None:
            self.context.router.finish(booked, now, output_tokens, was_computed=was_computed)

    # --- sending

    def _send(self) -> None:
        worker = self.worker
        assert worker is not None
        pool = self.context.upstreams.of(worker)
        connection = pool.take() if self.resends == 0 else None
        if connection is not None:
            self._send_on(connection)
        else:
            self._task = self.client.spawn(self._connect_and_send(worker))

    async def _connect_and_send(self, worker: WorkerSpec) -> None:
        pool = self.context.upstreams.of(worker)
        try:
            connection = await pool.connect()
        except OSError as error:
            self._connect_failed(worker, error)
            return
        self._task = None
        if self.is_ended:
            pool.put(connection)
            return
        self._send_on(connection)

    def _send_on(self, connection: UpstreamConnection) -> None:
        request = self.request
        self.upstream = connection
        self.connected_at = self.context.now()
        pool = connection.pool
        head = request_head(
            request.method,
            pool.base_path + request.target,
            pool.authority,
            request.passing_lines(),
            pool.authorization or request.authorization,
            request.body_size if request.has_body else None,
            request.request_id,
        )
        connection.send(self, head, request.body() if request.body_size else b"")

    def _connect_failed(self, worker: WorkerSpec, error: OSError) -> None:
        self._task = None
        context = self.context
        context.words.add(context.segment.layout.load(context.shard, worker.slot, at.L_CONNECT_FAILURES), 1)
        if error.errno in REFUSED:
            context.segment.set_status(worker.slot, at.STATUS_DOWN, expected=at.STATUS_UP)
        if self.is_ended:
            return
        reason = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        self.fail(connect_failed(f"the worker {worker.url} cannot be reached: {reason}"))

    # --- the answer, as the upstream connection reports it

    def interim_received(self, head: ResponseHead) -> None:
        """1xx: ours to answer if it is 100 (the client's Expect ended here), the client's otherwise."""
        if head.status != 100 and not self.request.is_http_1_0:
            self.client.transport.write(head.status_line + head.lines + b"\r\n\r\n")

    def head_received(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        """Returns the position after this message's bytes in `data`."""
        request = self.request
        self.client.release_body(request)
        if self.client.is_write_paused:
            self.pause_upstream()
        self.framing = framing
        self._is_unchunked = head.is_chunked and request.is_http_1_0 and not framing.is_done
        self.is_keep_alive = (
            request.keep_alive
            and not framing.ends_with_connection
            and not self._is_unchunked
            and not self.context.closes_connections
        )
        out = client_head(
            head, is_http_1_0=request.is_http_1_0, keep_alive=self.is_keep_alive, own_headers=self._own_headers()
        )
        available = len(data) - position
        if framing.is_done or available == 0 or available > SMALL_WRITE_BYTES or self._is_unchunked:
            self._head_written(head, out)
            return position if framing.is_done or available == 0 else self.body_received(framing, data, position)
        end = framing.feed(data, position)  # before anything is written: nonsense can still become a 502
        self._head_written(head, out + data[position:end])
        self._first_byte(head)
        self._note_usage(data)
        self.bytes_out = end - position
        return end

    def _head_written(self, head: ResponseHead, out: bytes) -> None:
        self.head, self.status = head, head.status
        self.client.transport.write(out)

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        transport = self.client.transport
        if self._is_unchunked:
            pieces: list[bytes] = []
            end = framing.feed(data, position, pieces)
            transport.writelines(pieces)
        else:
            end = framing.feed(data, position)
            transport.write(data if end - position == len(data) else data[position:end])
        self.bytes_out += end - position
        self._note_usage(data)
        if self.first_byte_at == 0.0 and self.head is not None:
            self._first_byte(self.head)
        if not self._is_unchunked:
            self.write_raw = transport.write
        return end

    def _first_byte(self, head: ResponseHead) -> None:
        now = self.first_byte_at = self.context.now()
        if head.is_event_stream and self.booked is not None:
            self.context.router.first_token(self.booked, now)

    def _note_usage(self, data: bytes) -> None:
        """`data` may begin before the body and end behind it; what is looked for is in neither."""
        self.events += 1
        carry = self.usage_data
        if TOKENS in data:
            # a usage object may have begun in the piece before, and what comes may not have it at all
            self.usage_data = carry[-CARRY_BYTES:] + data
        elif carry and self.head is not None and not self.head.is_event_stream:
            self.usage_data = carry[-CARRY_BYTES:] + data[:CARRY_BYTES]

    def answer_complete(self) -> None:
        self.upstream = None
        self._end(self.status, Ending.COMPLETE)

    def closed_unanswered(self, was_reused: bool) -> None:
        """The connection ended without one byte of an answer.

        On a reused one that is the worker's idle timeout crossing our request: it never read it, one more try on a
        fresh connection is safe.
        """
        self.upstream = None
        if was_reused and self.resends == 0:
            self.resends += 1
            self.context.count(at.G_UPSTREAM_RESENDS)
            self._send()
        else:
            self.answer_broken("the worker closed the connection without an answer")

    def answer_broken(self, reason: str) -> None:
        error = bad_answer(reason)
        context = self.context
        if self.worker is not None:
            context.words.add(context.segment.layout.load(context.shard, self.worker.slot, at.L_FAILURES), 1)
        if self.head is None:
            self.fail(error)
        else:
            self.cut(error, Ending.WORKER_BROKE)

    # --- what else can happen

    def client_left(self) -> None:
        self.context.count(at.G_CLIENT_DISCONNECTS)
        self._end(self.status or CLIENT_CLOSED_REQUEST, Ending.CLIENT_LEFT)

    def expire(self, ending: Ending = Ending.TIMEOUT) -> None:
        if ending is Ending.SHUTDOWN:
            error = no_worker("the gateway is shutting down")
        else:
            error = worker_timeout(f"no complete answer within {self.context.settings.request_timeout_s:g} s")
        if self.head is None:
            self.fail(error, ending)
        else:
            self.cut(error, ending)

    def pause_upstream(self) -> None:
        if self.upstream is not None and not self.has_paused_upstream:
            self.has_paused_upstream = True
            self.upstream.transport.pause_reading()

    def resume_upstream(self) -> None:
        if self.has_paused_upstream:
            self.has_paused_upstream = False
            if self.upstream is not None:
                self.upstream.transport.resume_reading()

    # --- endings

    def fail(self, error: RequestError, ending: Ending = Ending.REFUSED) -> None:
        """Nothing of an answer is out yet: the client gets `error`."""
        if self.is_ended:
            return
        keep_alive = self.client.write_error(self.request, error, self._extra_headers())
        self.is_keep_alive = keep_alive
        self._end(error.status, ending)

    def cut(self, error: RequestError, ending: Ending) -> None:
        """The head is out and the rest will not come: break the stream so that nobody takes it for complete.

        An event stream between two chunks gets its open line closed and an error event, then the connection ends
        without the final chunk. Inside a chunk, or where no event can be told, it ends at once; where the end of the
        connection *is* the end of the body, only a reset can tell.
        """
        head, framing, transport = self.head, self.framing, self.client.transport
        assert head is not None and framing is not None
        self.is_keep_alive = False
        may_speak = framing.is_between_chunks or framing.ends_with_connection or self._is_unchunked
        if head.is_event_stream and may_speak:
            event = _closing(framing.tail) + error_event(error)
            if not (self._is_unchunked or framing.ends_with_connection):
                event = b"%x\r\n%b\r\n" % (len(event), event)
            transport.write(event)
        elif framing.ends_with_connection or self._is_unchunked:
            peer: socket.socket | None = transport.get_extra_info("socket")
            if peer is not None:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()
        self._end(self.status, ending)

    def _end(self, status: int, ending: Ending) -> None:
        if self.is_ended:
            return
        self.is_ended = True
        now = self.context.now()
        was_computed = status < 400 or ending is Ending.CLIENT_LEFT
        self._unbook(now, self._output_tokens(ending), was_computed=was_computed)
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abandon()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self._report(status, ending, now)
        self.client.exchange_ended(self)

    # --- telling

    def _own_headers(self) -> bytes:
        upstream, plan = self.upstream, self.plan
        assert upstream is not None
        head = b"X-Request-Id: %b\r\n%b" % (self.request.request_id, upstream.pool.identity(self.table.generation))
        if plan is None:
            return head
        asked = self.asked_strategy
        head += plan.profile_line + (strategy_line(asked) if asked else plan.strategy_line)
        explanation = self._explanation() if self.request.wants_explanation else None
        return head if explanation is None else b"%bX-Pointsman-Decision: %b\r\n" % (head, explanation)

    def _explanation(self) -> bytes | None:
        """The decision, where the client may see it; as much of it as fits into a header."""
        decision = self.decision
        if decision is None or decision.explanation is None or not self.context.may_explain(self.client.peer):
            return None
        text = orjson.dumps(self._decision_json(decision))
        if len(text) > MAX_EXPLANATION_HEADER:
            text = orjson.dumps({**self._decision_head(decision), "explanation": "too long for a header"})
        return text

    def _decision_head(self, decision: Booked) -> dict[str, object]:
        return {
            "id": self.request.request_id.decode("latin-1"),
            "generation": self.table.generation,
            "model": self.features.model,
            "profile": self.plan.profile if self.plan else "",
            "policy": self._policy(),
            "worker": decision.worker.url,
            "reason": reason_name(decision.reason),
            "prompt_tokens": decision.prompt_tokens,
            "matched_tokens": decision.cached_tokens,
            "predicted_ttft_s": round(decision.predicted_s, 6),
        }

    def _decision_json(self, decision: Booked) -> dict[str, object]:
        found = self._decision_head(decision)
        if decision.explanation is not None:
            found["explanation"] = decision.explanation.as_json([w.url for w in self.table.everyone.workers])
        return found

    def _policy(self) -> str:
        return self.asked_strategy or (self.plan.policy if self.plan else "")

    def _extra_headers(self) -> tuple[tuple[str, str], ...]:
        return (("X-Pointsman-Generation", str(self.table.generation)),)

    def _output_tokens(self, ending: Ending) -> int | None:
        """None: the answer is not a whole one, nothing is to be learned from it."""
        head = self.head
        if ending is not Ending.COMPLETE or head is None or head.status != 200:
            return None
        usage = self.usage = read_usage(self.usage_data)
        if usage.output_tokens is None and head.is_event_stream:
            return max(self.events - 1, 1)  # an engine writes one event a token
        return usage.output_tokens

    def _report(self, status: int, ending: Ending, now: float) -> None:
        context = self.context
        started = self.request.started
        label = self.route.label
        model = self.table.model_index.get(self.features.model, 0)
        context.series.count(label, model, status)
        context.series.observe(label, at.KIND_DURATION, now - started)
        if self.first_byte_at:
            context.series.observe(label, at.KIND_FIRST_BYTE, self.first_byte_at - started)
        if self.decision is not None and self.plan is not None:
            self._note_decision(self.decision, status, now)
        if self.taken is not None:
            self._record(self.taken, model, status)
        if context.settings.access_log:
            context.log_line(self._log_line(status, ending, now))

    def _note_decision(self, decision: Booked, status: int, now: float) -> None:
        context, usage, started = self.context, self.usage, self.request.started
        head = self.head
        first_byte_us = UNKNOWN
        if self.first_byte_at and head is not None and head.is_event_stream and status == 200:
            first_byte_us = int((self.first_byte_at - started) * 1e6)
        ended_us = context.wall_us(now)
        request_key = context.router.note(
            decision,
            self.request.request_id,
            context.upstreams.of(decision.worker).key,
            ended_us,
            first_byte_us,
            int((now - started) * 1e6),
            UNKNOWN if usage.output_tokens is None else usage.output_tokens,
            UNKNOWN if usage.prompt_tokens is None else usage.prompt_tokens,
            UNKNOWN if usage.cached_tokens is None else usage.cached_tokens,
            status,
        )
        if decision.explanation is not None:
            context.explanations.note(request_key, ended_us, orjson.dumps(self._decision_json(decision)))

    def _record(self, taken: Taken, model: int, status: int) -> None:
        usage, output_tokens = self.usage, self.usage.output_tokens
        if output_tokens is None and self.head is not None and self.head.is_event_stream:
            output_tokens = max(self.events - 1, 1)
        self.context.recording.end(
            taken,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=output_tokens,
            model=model,
            is_streamed=self.features.is_stream,
            status=status,
        )

    def _log_line(self, status: int, ending: Ending, now: float) -> bytes:
        request, plan, decision, usage = self.request, self.plan, self.decision, self.usage
        context, started, worker = self.context, request.started, self.worker
        is_routed = decision is not None and plan is not None
        return request_line(
            context.wall_us(now) / 1e6,
            request.request_id,
            context.shard,
            self.client.peer_bytes,
            request.method,
            self.route.path_json or path_json(request),
            status,
            orjson.dumps(self.features.model),
            self.features.is_stream,
            plan.profile_json if plan is not None else b'""',
            orjson.dumps(self.asked_strategy)[1:-1] if self.asked_strategy else plan.policy_text if plan else b"",
            self.table.generation,
            b'""' if worker is None else orjson.dumps(worker.url),
            (self.connected_at - started) * 1000 if self.connected_at else nan,
            (self.first_byte_at - started) * 1000 if self.first_byte_at else nan,
            (now - started) * 1000,
            request.body_size,
            self.bytes_out,
            self.resends,
            reason_name(decision.reason).encode() if decision is not None and is_routed else b"",
            usage.prompt_tokens,
            decision.cached_tokens if decision is not None else 0,
            usage.cached_tokens,
            usage.output_tokens,
            _ENDINGS[ending],
        )


def reason_name(reason: int) -> str:
    """Of a position in REASONS; the routing state was not to be had for others."""
    return REASONS[reason] if reason >= 0 else "unlocked"


def _closing(tail: bytes) -> bytes:
    """What ends an open line and an open event, given the last bytes of an event stream."""
    text = tail.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not text or text.endswith(b"\n\n"):
        return b""
    return b"\n" if text.endswith(b"\n") else b"\n\n"
