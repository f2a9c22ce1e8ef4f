"""One routed request, from the pick to the end of its answer.

Theory of operation. An exchange is in one of these phases, and leaves the last one exactly once:

    start ──> queued ──> connecting ──> waiting (sent, nothing passed on yet) ──> answering ──> ended
                             ^  │             │                                       │
                             │  └──────┬──────┘                                       │
                     pause   │         v                                              v
                             └── attempt failed ──> fail(error): an error answer     cut(error): the stream is broken

Whatever happens, in whatever order (the answer ends, the worker breaks, the client leaves, a deadline passes), the
booking and the permit are released, the request is counted and logged in `end`, and nowhere else.

An attempt fails before a byte of its answer went to the client, or not at all: the head of an answer is held back while
it may still be retried (an error status; an event stream until its first event, see `gate`). `resilience.retry` decides
what follows. Every attempt is a pick and a booking of its own, without the workers that failed this request.

What is answered is the worker's own bytes. Once the head is out, an error can only be told by breaking the stream: a
cut stream never ends as if it were complete (no final chunk, no `[DONE]`). Under `streamFailure: continue` a broken
stream goes back to "attempt failed" instead, and the next attempt asks for the rest of its text.

Here is what every request needs. What few need is in modules of its own, each of which is told by the exchange what
happens, and drives it by its public methods:

    metering    before the pick: what is taken of the rates        continued   a stream that may be continued
    admitting   the queue                                          pair        the other leg, with prefill and decode
    pausing     nothing is sent while the daemon is paused         pinging     a stream that keeps its client waiting
    retrying    what follows a failed attempt                      deadlines   what follows a missed deadline
    connecting  what a failed connection says of a worker          breaking    how a stream is cut
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.dispatch.router import Ask
from pointsman.daemon.dispatch.verdicts import NUMBERS, VERDICTS
from pointsman.daemon.errors import CIRCUIT_OPEN, RequestError, bad_answer, model_not_found, no_worker, worker_drained
from pointsman.daemon.relay.aborting import abort_request
from pointsman.daemon.relay.answers import LAST_CHUNK, chunk, error_event
from pointsman.daemon.relay.breaking import break_off
from pointsman.daemon.relay.connecting import connect_failure
from pointsman.daemon.relay.continued import Continued
from pointsman.daemon.relay.deadlines import miss
from pointsman.daemon.relay.ending import CLIENT_CLOSED_REQUEST, Ending
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.gate import first_event_error, is_partial
from pointsman.daemon.relay.heads import ResponseHead, client_head, joined, request_head
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.metering import Metered, take_request
from pointsman.daemon.relay.pair import pair_up
from pointsman.daemon.relay.pinging import open_after_ping, ping
from pointsman.daemon.relay.receiver import NOT_TAKEN
from pointsman.daemon.relay.retrying import attempt_failed, is_retried, status_outcome
from pointsman.daemon.relay.routed import Caller, Routed
from pointsman.daemon.relay.routes import PAIR_PROBE, Route
from pointsman.daemon.relay.telling import error_headers, output_tokens, own_headers, report, tokens_served
from pointsman.daemon.relay.upstream import UpstreamConnection, UpstreamPool
from pointsman.daemon.relay.usage import CARRY_BYTES, holds_counts
from pointsman.daemon.resilience.breaker import UNCOUNTED, Verdict, verdict_of
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind
from pointsman.daemon.resilience.timeouts import Watch
from pointsman.daemon.resilience.waiting import Waiter
from pointsman.daemon.routing.body import Features
from pointsman.daemon.routing.table import Plan, Pool, RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import FAILED, NEUTRAL, SUCCEEDED, Booked

SMALL_WRITE_BYTES = 16384
_COMPLETE, _CLIENT_LEFT = Ending.COMPLETE, Ending.CLIENT_LEFT
_H_PAUSED_S, _H_RECORDING = at.H_PAUSED_S, at.H_RECORDING


class Exchange(Routed):
    """What is not set in `__init__` begins as None, 0 or False: it is a C struct (exchange.pxd)."""

    watch: Watch
    is_held: bool
    """by a pause"""
    failed: tuple[int, ...]
    """slots of the workers that failed it"""
    _held: ResponseHead | None
    """the head of a stream whose first event has not come, or not all of it"""
    _held_data: bytes
    _metered: Metered | None
    _permit: Waiter | None
    _has_free_permit: bool
    _is_probe: bool
    _told: int | None
    """what the breaker has heard already"""
    is_pinged: bool
    """our own head and a comment went out before the worker said anything"""
    _pause: asyncio.TimerHandle | None
    is_unchunked: bool
    """the client knows no chunks: the worker's are taken off"""
    _task: asyncio.Task[None] | None

    def __init__(self, client: Caller, request: Inbound, route: Route, features: Features, table: RoutingTable) -> None:
        self._begin(client, request, route, features, table)
        self.failed = ()
        self._held_data = b""

    # --- choosing

    def start(self) -> None:
        context = self.context
        try:
            self.pool = self._pool()
            prompt_tokens = context.short_way.read_prompt(self.features)
            plan = self._plan(prompt_tokens)
            if self.table.has_pairs:
                self.pair, self.pool = pair_up(self, plan, self.pool)
            self._watch(plan)
            key = self.request.key
            limits = plan.key_limits if key is None or key.limits is None else key.limits
            if limits is not None:
                self._metered = Metered.take(self, limits, prompt_tokens)
            if plan.is_rate_limited:
                take_request(self, plan)
        except RequestError as error:
            self.fail(error)
            return
        if context.is_paused():
            self.hold(self._go_on)
        else:
            self._enter_and_pick(plan, prompt_tokens)

    def _go_on(self) -> None:
        """What `start` does, after a pause."""
        if not self.is_ended and self.plan is not None:
            self._enter_and_pick(self.plan, self.context.short_way.read_prompt(self.features))

    def _enter_and_pick(self, plan: Plan, prompt_tokens: int) -> None:
        try:
            if not self._enter(plan, prompt_tokens):
                return
            self._pick(prompt_tokens)
        except RequestError as error:
            self.fail(error)
            return
        self.send()

    def hold(self, go_on: Callable[[], None]) -> None:
        """Until the pause is over."""
        try:
            self.context.pausing.hold(self, go_on)
            self.is_held = True
        except RequestError as error:
            self.give_up(error)

    def start_any(self) -> None:
        """For questions that any healthy worker answers (`/version`)."""
        self.pool = self.table.for_questions
        self._watch(self.table.early_plan(None))
        self.context.resilience.enter_freely()
        self._has_free_permit = True
        try:
            self._pick()
        except RequestError as error:
            self.fail(error)
            return
        self.send()

    def admitted(self) -> None:
        """Its turn in the queue has come."""
        if self.is_ended:
            return
        self.queued_s = self.context.now() - self.request.started
        self.again()

    def again(self) -> None:
        """The next attempt, or the first one after waiting in the queue."""
        self._pause = None
        if self.is_ended:
            return
        if self.context.is_paused():
            self.hold(self.again)
            return
        try:
            self._pick(self.context.short_way.read_prompt(self.features))
        except RequestError as error:
            self.give_up(error)
            return
        self.send()

    def _pool(self) -> Pool | None:
        """None: if anybody serves the model, then a pair."""
        pool = self.table.pool_for(self.features.model)
        if pool is None and not self.table.has_pairs:
            raise model_not_found(self.features.model)
        return pool

    def _plan(self, prompt_tokens: int) -> Plan:
        request, features = self.request, self.features
        key = request.key
        plan: Plan | None = self.table.only_plan if request.profile is None else None
        if plan is None:
            plan, is_known = self.table.plan_for(
                request.profile,
                features.model,
                self.route.path,
                request.header,
                prompt_tokens,
                features.max_tokens,
                None if key is None else key.name,
            )
            if not is_known:
                self.context.count(at.G_PROFILE_FALLBACKS)
        if key is not None:
            key.check_profile(plan.profile)
        self.plan = plan
        return plan

    def _watch(self, plan: Plan) -> None:
        self.watch = watch = Watch(plan.timeouts, self.request.started, self.features.is_stream)
        self.context.wheel.arm(self, watch.first_look())

    def _enter(self, plan: Plan, prompt_tokens: int) -> bool:
        """Whether it may go on at once. Raises RequestError when there is no room for it."""
        context = self.context
        if context.resilience.is_unlimited() or self.route is PAIR_PROBE:
            context.resilience.enter_freely()
            self._has_free_permit = True
            return True
        waiter = self._permit = context.admitting.enter(self, plan, prompt_tokens)
        self._has_free_permit = waiter is None
        return waiter is None or waiter.is_admitted

    def _pick(self, prompt_tokens: int = 0) -> None:
        """Choose and book. Raises RequestError when nobody can take it."""
        if self.pair is not None:
            self.pair.pick(prompt_tokens, self.failed)
            return
        resilience = self.context.resilience
        pool = self.pool
        assert pool is not None
        if not self.failed and resilience.is_quiet():
            self._choose(pool, prompt_tokens)
            return
        failed = self.failed
        for _ in range(len(pool.slots) + 1):
            now = self.context.now()
            try:
                fit = resilience.fit(pool, failed, now)
            except RequestError as error:
                self.context.count(at.G_BREAKER_REFUSED, error.code == CIRCUIT_OPEN)
                raise
            booked = self._choose(fit.pool, prompt_tokens)
            if booked.slot in fit.overruled:
                booked.ticket = UNCOUNTED
                return
            if resilience.is_closed(booked.slot):
                return
            ticket = resilience.acquire(booked.slot, now)
            if ticket is not None:
                booked.ticket = ticket
                self._is_probe = ticket != UNCOUNTED
                return
            # somebody else's probe went out a moment ago
            self.drop_booking()
            failed = (*failed, booked.slot)
        raise pool.nobody("their breakers wait for the results of probes")

    def _choose(self, pool: Pool, prompt_tokens: int) -> Booked:
        context, plan, now = self.context, self.plan, self.context.now()
        if plan is None:
            booked = context.router.choose_any(pool)
        elif self._is_plain(pool, plan, now):
            size, is_retry = self._body_size(), self.attempts > 1
            booked = context.short_way.choose(self.features, size, pool, plan, prompt_tokens, now, is_retry)
        else:
            booked = context.router.choose(self.ask(plan, now), self.table, pool, plan, prompt_tokens, now)
        self.take(booked, booked)
        return booked

    def take(self, booked: Booked, decision: Booked, is_probe: bool = False) -> None:
        """`booked` is the worker whose answer is relayed; `decision`: whose pick is told of, for a pair prefill's."""
        if self.decision is None and self.plan is not None and self.context.words.get(_H_RECORDING):
            self.taken = self.context.recording.begin(self.context.router.chain, self.request.started)
        self.booked, self.decision, self.worker = booked, decision, booked.worker
        self._is_probe = is_probe

    def _is_plain(self, pool: Pool, plan: Plan, now: float) -> bool:
        """Whether nothing but prompt, loads and costs decides, and nobody wants to know why: nearly always."""
        request = self.request
        return (
            plan.expected_cost is not None
            and not (request.has_routing_headers or request.wants_explanation or pool.has_buckets)
            and now < self.context.next_sample
        )

    def ask(self, plan: Plan, now: float) -> Ask:
        request, context = self.request, self.context
        wants_explanation = context.is_sample_due(now)
        if request.wants_explanation and context.may_explain(self.client.peer):
            wants_explanation = True
        headers = None
        if plan.expected_cost is None or request.has_routing_headers:
            headers = request.header_map()
            self.asked_strategy = plan.selection.asked_in(headers)
        return Ask(self.features, self._body_size(), headers, wants_explanation, self.attempts > 1)

    def _tell_breaker(self, verdict: int) -> None:
        """Before the client can know: its next request may come to another shard, and is to find the breaker open."""
        booked = self.booked
        if booked is not None and self._told is None:
            self._told, self._is_probe = verdict, False
            self.context.resilience.record(booked.slot, booked.ticket, VERDICTS[verdict], self.context.now())

    def _unbook(self, now: float, tokens: int | None, was_computed: bool, verdict: int = NEUTRAL) -> None:
        booked, self.booked = self.booked, None
        if booked is None:
            return
        context = self.context
        told, self._told = self._told, None
        if told in (verdict, FAILED):
            verdict = NEUTRAL
        if context.short_way.finish(booked, now, tokens, was_computed, verdict) or self._is_probe:
            self._is_probe = False
            context.resilience.record(booked.slot, booked.ticket, VERDICTS[verdict], now)

    def drop_booking(self, verdict: Verdict = Verdict.NEUTRAL) -> None:
        """Nothing was computed under it, as far as is known."""
        self._unbook(self.context.now(), None, False, NUMBERS[verdict])

    # --- sending

    def _body_size(self) -> int:
        rest = self.rest()
        return self.request.body_size if rest is None else len(rest)

    def rest(self) -> bytes | None:
        """What is sent in place of the client's body: the request for the rest of a broken stream."""
        return None if self.continued is None else self.continued.rest

    def send(self) -> None:
        if self.is_ended:
            return
        if self.context.is_paused():
            self.hold(self.send)
        elif self.pair is not None:
            self.pair.send()
        else:
            self.send_now()

    def send_now(self) -> None:
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
            connection = await pool.connect(self.watch.section.connect_s)
        except OSError as error:
            self._task = None
            found = connect_failure(self.context, worker, error)
            if not self.is_ended:
                attempt_failed(self, Outcome(OutcomeKind.CONNECT_FAILED), found)
            return
        self._task = None
        if self.is_ended:
            pool.put(connection)
        elif self.context.is_paused():
            pool.put(connection)
            if self.pair is None:
                self.hold(self.send)
            else:
                self.pair.hold(self.send_now)
        else:
            self._send_on(connection)

    def _send_on(self, connection: UpstreamConnection) -> None:
        request, body = self.request, self.rest()
        if self.pair is not None:
            if not self.pair.may_send_decode():
                connection.pool.put(connection)
                return
            body = self.pair.decode_body or body
        self.upstream = connection
        self.connected_at = now = self.context.now()
        self.note_sent(now)
        head = self.request_head_for(connection.pool, request.body_size if body is None else len(body))
        if body is not None:
            connection.send(self, head, body)
            self._watch_again(now)
        else:
            connection.send(self, head, request.body_view() if request.body_size else b"")

    def note_sent(self, now: float) -> None:
        """From here on the client waits for its first token."""
        self.watch.sent(now, self.context.words.get_real(_H_PAUSED_S))

    def request_head_for(self, pool: UpstreamPool, body_size: int) -> bytes:
        request = self.request
        return request_head(
            self.method,
            pool.base_path + request.target,
            pool.authority,
            request.passing_lines(),
            pool.authorization or request.authorization,
            body_size if request.has_body else None,
            request.request_id,
        )

    # --- attempts that fail (relay.retrying)

    def forget_answer(self) -> None:
        """Of an attempt that has failed: what came of it, and went to nobody."""
        self.watch.failed()
        self._held, self._held_data = None, b""
        self.framing = self.framing if self.is_pinged else None

    def again_in(self, delay_s: float) -> None:
        self._pause = self.context.loop.call_later(delay_s, self.again)

    def give_up(self, error: RequestError) -> None:
        """No attempt follows."""
        self.finish_with(error, Ending.REFUSED if self.head is None else Ending.WORKER_BROKE, NEUTRAL)

    # --- the answer, as the upstream connection reports it

    def interim_received(self, head: ResponseHead) -> None:
        """1xx: ours to answer if it is 100 (the client's Expect ended here), the client's otherwise."""
        if head.status != 100 and not self.request.is_http_1_0:
            self.client.transport.write(head.status_line + head.lines + b"\r\n\r\n")

    def head_received(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        """Returns the position after this message's bytes in `data`, or NOT_TAKEN."""
        if head.status >= 400:
            if is_retried(self, status_outcome(self, head), head, framing, data, position):
                return NOT_TAKEN
            return self.open(head, framing, data, position)
        if self.pair is not None:
            self.pair.decode_headed()
            if self.pair.merging is not None and not head.is_event_stream:
                return self.pair.merging.hold(head, framing, data, position)
        if head.is_event_stream and not framing.is_done:
            self._held, self.framing = head, framing
            return self._first_event(head, framing, data, position)
        return self.open(head, framing, data, position)

    def _first_event(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        """What `head_received` does. Nothing is passed on, or read by the framing, before the event is whole."""
        if self._held_data:
            before = len(self._held_data)
            whole = self._held_data + data[position:]
            self._held_data = b""
            end = self._first_event(head, framing, whole, 0)
            return end if end == NOT_TAKEN else max(end - before, 0) + position
        if is_partial(head, data, position):
            self._held_data = data[position:]
            return len(data)
        self._held = None
        outcome = first_event_error(data, position)
        if outcome is not None:
            if is_retried(self, outcome, head, framing, data, position):
                return NOT_TAKEN
            if self.pair is not None:
                self.pair.failed(outcome, Verdict.NEUTRAL)
        return self.open(head, framing, data, position, outcome is not None)

    def open(
        self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int, has_failed: bool = False
    ) -> int:
        """Pass the answer on, from here to its end."""
        if self.continued is not None and self.continued.rest is not None:
            return self.continued.open_rest(head, framing, data, position, has_failed=has_failed)
        request, plan = self.request, self.plan
        if plan is not None and plan.continues_streams and not has_failed:
            self.continued = Continued.begin(self, head)
        if self.continued is None:
            self.forget_body()
        if self.client.is_write_paused:
            self.pause_upstream()
        if self.is_pinged:
            return open_after_ping(self, head, framing, data, position)
        self.framing = framing
        self.is_unchunked = head.is_chunked and request.is_http_1_0 and not framing.is_done
        self.is_keep_alive = (
            request.keep_alive
            and not framing.ends_with_connection
            and not self.is_unchunked
            and not self.context.closes_connections()
        )
        out = client_head(head, request.is_http_1_0, self.is_keep_alive, own_headers(self))
        available = len(data) - position
        has_nothing = framing.is_done or available == 0
        is_read = self.is_unchunked or self.continued is not None or self.pair is not None
        if has_nothing or available > SMALL_WRITE_BYTES or is_read:
            self._head_written(head, out)
            return position if has_nothing else self.body_received(framing, data, position)
        end = framing.feed(data, position)  # before anything is written: nonsense can still become a 502
        self._head_written(head, joined(out, data, position, end), framing.is_done and self.is_keep_alive)
        self._first_byte(head)
        if framing.is_done:
            self.events, self.usage_data = 1, data  # all of it is here to be read, whether it holds counts or not
        else:
            self._note_usage(data)
        self.bytes_out = end - position
        return end

    def _head_written(self, head: ResponseHead, out: bytes, is_whole: bool = False) -> None:
        """`is_whole`: nothing follows, and the connection stays open."""
        self.head, self.status = head, head.status
        self.watch.has_answer = True
        self.judge(head.status)
        if is_whole:
            self.client.write_soon(out)
        else:
            self.client.transport.write(out)

    def judge(self, status: int) -> None:
        """What the head says of the worker, before the client can act on it: on another shard, perhaps."""
        if status >= 400:
            verdict = verdict_of(status)
            if self.pair is not None:
                verdict, _ = self.pair.failed(Outcome(OutcomeKind.STATUS, status), verdict)
            self.drop_booking(verdict)
        elif self._is_probe:
            self._tell_breaker(SUCCEEDED)

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        """Returns what `head_received` does."""
        if self._held is not None:
            return self._first_event(self._held, framing, data, position)
        if self.continued is not None:
            return self.continued.body_received(framing, data, position)
        if self.pair is not None and self.pair.merging is not None:
            return self.pair.merging.body_received(framing, data, position)
        transport = self.client.transport
        if self.is_unchunked:
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
        if not self.is_unchunked:
            self.sink = transport
        return end

    def tell_events(self, events: bytes) -> None:
        """What `body_received` does, with whole events in a chunk of ours."""
        if not events:
            return
        out = chunk(events)
        self.client.transport.write(out)
        self.bytes_out += len(out)
        self._note_usage(events)
        if self.first_byte_at == 0.0 and self.head is not None:
            self._first_byte(self.head)

    def end_chunks(self) -> None:
        self.client.transport.write(LAST_CHUNK)

    def forget_body(self) -> None:
        self.client.release_body(self.request)
        self.features.prompt = ()  # spans of the body

    def _first_byte(self, head: ResponseHead) -> None:
        now = self.first_byte_at = self.context.now()
        if head.is_event_stream and self.booked is not None:
            self.context.chooser.first_token(self.booked, now)
        if self.pair is not None:
            self.pair.decode_began()

    def _note_usage(self, data: bytes) -> None:
        """`data` may begin before the body and end behind it; what is looked for is in neither."""
        self.events += 1
        carry = self.usage_data
        if holds_counts(data):
            # a usage object may have begun in the piece before, and what comes may not have it at all
            self.usage_data = carry[-CARRY_BYTES:] + data
        elif carry and self.head is not None and not self.head.is_event_stream:
            self.usage_data = carry[-CARRY_BYTES:] + data[:CARRY_BYTES]

    def answer_complete(self) -> None:
        if self._held is not None and self.framing is not None:  # a stream that ended before its first event
            self.open(self._held, self.framing, self._held_data, 0)
        if self.pair is not None and self.pair.merging is not None and not self.pair.merging.finish():
            return
        self.upstream = None
        if self.continued is None or self.continued.finish():
            self.end(self.status, _COMPLETE)

    def closed_unanswered(self, was_reused: bool) -> None:
        """The connection ended without one byte of an answer.

        On a reused one that is the worker's idle timeout crossing our request: it never read it, one more try on a
        fresh connection is safe.
        """
        self.upstream = None
        error = bad_answer("the worker closed the connection without an answer")
        attempt_failed(self, Outcome(OutcomeKind.STALE if was_reused else OutcomeKind.RESET), error)

    def answer_broken(self, reason: str) -> None:
        error = bad_answer(reason)
        if self.head is None or self.is_resumed():
            self.abandon_upstream()
            attempt_failed(self, Outcome(OutcomeKind.RESET), error)
            return
        if self.worker is not None:
            self.context.count_at(self.worker.slot, at.L_FAILURES)
        self.cut(error, Ending.WORKER_BROKE)

    def is_resumed(self) -> bool:
        """Whether what has broken is gone on with by the next attempt, if there is one."""
        return self.continued is not None and self.continued.resume()

    # --- what else can happen

    def client_left(self) -> None:
        self.context.count(at.G_CLIENT_DISCONNECTS)
        self.end(self.status or CLIENT_CLOSED_REQUEST, Ending.CLIENT_LEFT)

    def look(self, now: float) -> float:
        """The wheel asks whether a deadline has passed; returns when to ask again."""
        if self.watch.is_ping_due(now) and not self._held_data:
            ping(self)
        paused_s = self.context.pausing.pause.paused_s(now)
        missed, at_s = self.watch.look(now, self.events + self.bytes_out, paused_s)
        if missed is not None:
            miss(self, missed)
            at_s = self.watch.look(now, 0, paused_s)[1]  # an attempt may follow
        return math.inf if self.is_ended else at_s

    def _watch_again(self, now: float) -> None:
        """Another deadline runs than a moment ago."""
        paused_s = self.context.pausing.pause.paused_s(now)
        self.context.wheel.arm(self, self.watch.look(now, self.events + self.bytes_out, paused_s)[1])

    def shut_down(self) -> None:
        """The daemon's grace is over."""
        self.finish_with(no_worker("the gateway is shutting down"), Ending.SHUTDOWN, NEUTRAL)

    def end_drained(self) -> None:
        """Its worker's drain has come to its deadline."""
        assert self.worker is not None
        self.finish_with(worker_drained(self.worker.url), Ending.DRAINED, NEUTRAL)

    def finish_with(self, error: RequestError, ending: Ending, verdict: int) -> None:
        if self.head is None:
            self.fail(error, ending, verdict=verdict)
        else:
            self.cut(error, ending, verdict=verdict)

    def pause_upstream(self) -> None:
        if self.upstream is not None and not self.has_paused_upstream:
            self.has_paused_upstream = True
            self.upstream.pause_reading()
            self.context.wheel.arm(self, min(self.watch.stalled(self.context.now()), self.watch.ends_at))

    def resume_upstream(self) -> None:
        if self.has_paused_upstream:
            self.has_paused_upstream = False
            now = self.context.now()
            self.watch.reads_again(now)
            self._watch_again(now)
            if self.upstream is not None:
                self.upstream.resume_reading()

    # --- endings

    def fail(self, error: RequestError, ending: Ending = Ending.REFUSED, *, verdict: int = NEUTRAL) -> None:
        """Nothing of an answer is out yet: the client gets `error`."""
        if self.is_ended:
            return
        self.blame = error.fault
        if verdict == FAILED:
            self._tell_breaker(verdict)
        self.is_keep_alive = self.client.write_error(self.request, error, error_headers(self))
        self.end(error.status, ending, verdict)

    def cut(self, error: RequestError, ending: Ending, *, verdict: int = FAILED) -> None:
        """The head is out and the rest will not come: break the stream so that nobody takes it for complete."""
        self.blame = error.fault
        if self.continued is not None and self.continued.is_finished():
            self.end(self.status, _COMPLETE)
            return
        self.is_keep_alive = False
        if verdict == FAILED:
            self._tell_breaker(verdict)
        if self.continued is not None:
            self.tell_events(error_event(error))
        else:
            break_off(self, error)
        self.end(self.status, ending, verdict)

    def end(self, status: int, ending: Ending, verdict: int = NEUTRAL) -> None:
        if self.is_ended:
            return
        self.is_ended = True
        context, now = self.context, self.context.now()
        context.wheel.disarm(self)
        if self.is_held:
            context.pausing.let_go(self)
        if ending is _COMPLETE:
            verdict = SUCCEEDED if status < 400 else NUMBERS[verdict_of(status)]
        was_computed = status < 400 or ending is _CLIENT_LEFT
        tokens = own_tokens = output_tokens(self, ending)
        if tokens is not None and self.continued is not None:
            own_tokens = max(tokens - self.continued.transcript.spent, 0)  # of the booking that ends now
        self._unbook(now, own_tokens, was_computed, verdict)
        self._leave(tokens)
        if self._metered is not None:
            self._metered.correct(context, now, sum(tokens_served(self, status)))
        upstream, rid = self.upstream, self.features.rid
        if upstream is not None or self._task is not None:  # seldom: the call is saved
            self.abandon_leg()
        if upstream is not None and rid and ending in (Ending.CLIENT_LEFT, Ending.TIMEOUT):
            _ = self.client.spawn(abort_request(upstream.pool, rid, self.request.request_id))
        if self._pause is not None:
            self._pause.cancel()
        if self.pair is not None:
            self.pair.end(is_complete=ending is Ending.COMPLETE)
        self.features.prompt = ()
        report(self, status, ending, now)
        if self.continued is not None:
            self.continued = None  # each holds the other: no cycle, so that both go at once
        self.client.exchange_ended(self.request, self.is_keep_alive)

    def _leave(self, tokens: int | None) -> None:
        """Give the permit back, or the place in the queue."""
        if self._has_free_permit:
            self.context.resilience.leave_freely()
        elif self._permit is not None:
            decision = self.decision
            served = None if tokens is None or decision is None else float(decision.prompt_tokens + tokens)
            self.context.admitting.leave(self._permit, served)

    def abandon_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abandon()

    def abandon_leg(self) -> None:
        """The connection to the worker, if it is still to be made as well."""
        self.abandon_upstream()
        if self._task is not None:
            self._task.cancel()
            self._task = None
