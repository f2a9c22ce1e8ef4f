"""The prefill leg of a pair: its connection, and its answer, of which the client sees nothing but an error.

It receives as an exchange does. What happens to it is told to the `Pair`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.pd.legs import Broken, Finished, FirstByte, Headed, Leg
from pointsman.daemon.relay.connecting import connect_failure
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.gate import first_event_error, is_partial
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.receiver import Receiver
from pointsman.daemon.relay.upstream import UpstreamConnection
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange
    from pointsman.daemon.relay.pair import Pair

DRAIN_S = 10.0
"""for the rest of an answer that nobody waits for"""
MAX_COLLECTED_BYTES = 64 << 20


class PrefillLeg(Receiver):
    heir: Exchange | None = None
    """the exchange itself, once the client gets this leg's answer: it is an error"""
    connection: UpstreamConnection | None = None
    _head: ResponseHead | None = None
    _held = b""
    """the beginning of an event stream, until its first event is whole"""
    _has_begun = False
    _task: asyncio.Task[None] | None = None
    _end_drain: asyncio.TimerHandle | None = None

    def __init__(self, pair: Pair, worker: WorkerSpec, body: bytes, *, collects: bool) -> None:
        self.pair: Pair | None = pair
        self.exchange = pair.exchange
        self.context = pair.exchange.context
        self.method = pair.exchange.method
        self.usage_data = b""
        self.worker = worker
        self._body = body
        self._pieces: list[bytes] | None = [] if collects else None
        self._collected = 0

    def start(self, *, is_fresh: bool) -> None:
        """`is_fresh`: on a new connection."""
        pool = self.context.upstreams.of(self.worker)
        connection = None if is_fresh else pool.take()
        if connection is not None:
            self._send_on(connection)
        else:
            self._task = self.exchange.client.spawn(self._connect_and_send())

    def cancel(self) -> None:
        """Closing the connection aborts the request at the engine."""
        self.pair = None
        if self._task is not None:
            self._task.cancel()
            self._task = None
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abandon()
        if self._end_drain is not None:
            self._end_drain.cancel()

    def drain(self) -> None:
        """Nobody waits for it any more; its connection may be used again when the answer is at its end."""
        self.pair = None
        self._pieces = None
        if self.connection is not None:
            self._end_drain = self.context.loop.call_later(DRAIN_S, self.cancel)

    async def _connect_and_send(self) -> None:
        pool = self.context.upstreams.of(self.worker)
        try:
            connection = await pool.connect(self.exchange.watch.section.connect_s)
        except OSError as error:
            self._task = None
            if self.pair is not None:
                found = connect_failure(self.context, self.worker, error)
                self.pair.prefill_broken(Outcome(OutcomeKind.CONNECT_FAILED), found)
            return
        self._task = None
        if self.pair is None:
            pool.put(connection)
        elif self.context.is_paused():
            pool.put(connection)
            self.pair.hold(self._start_again)
        else:
            self._send_on(connection)

    def _start_again(self) -> None:
        """After a pause."""
        if self.pair is not None:
            self.start(is_fresh=False)

    def _send_on(self, connection: UpstreamConnection) -> None:
        self.connection = connection
        head = self.exchange.request_head_for(connection.pool, len(self._body))
        connection.send(self, head, self._body)

    # --- the answer, as the upstream connection reports it

    def interim_received(self, head: ResponseHead) -> None:
        pass

    def head_received(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        if head.status >= 400 and self.pair is not None:
            end = self.pair.prefill_refused(self, head, framing, data, position)
            if end is not None:
                self.has_paused_upstream = self.heir is not None and self.heir.has_paused_upstream
                return end
        self._head = head
        self._tell(Headed(Leg.PREFILL))
        return self.body_received(framing, data, position) if position < len(data) else position

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        if self.heir is not None:
            return self.heir.body_received(framing, data, position)
        if not self._has_begun and self._begin(data, position):
            return len(data)
        pieces = self._pieces
        count = 0 if pieces is None else len(pieces)
        end = framing.feed(data, position, pieces)
        if pieces is not None:
            self._collected += sum(map(len, pieces[count:]))
            if self._collected > MAX_COLLECTED_BYTES:
                self._broken(OutcomeKind.RESET, "prefill's answer is too long")
        return end

    def _begin(self, data: bytes, position: int) -> bool:
        """The first bytes of the body. True: they tell an error, the leg is over."""
        head = self._head
        if head is not None and head.is_event_stream:
            held = self._held + data[position:]
            if is_partial(head, held, 0):
                self._held = held
                return False
            self._held = b""
            outcome = first_event_error(held, 0)
            if outcome is not None:
                self._has_begun = True
                self._abandon()
                self._tell_broken(outcome, "the prefill worker failed the request")
                return True
        self._has_begun = True
        self._tell(FirstByte(Leg.PREFILL))
        return False

    def answer_complete(self) -> None:
        if self.heir is not None:
            self.heir.answer_complete()
            return
        self.connection = None
        if self._end_drain is not None:
            self._end_drain.cancel()
        if self.pair is not None:
            self.pair.prefill_finished(None if self._pieces is None else b"".join(self._pieces))

    def closed_unanswered(self, was_reused: bool) -> None:
        self.connection = None
        kind = OutcomeKind.STALE if was_reused else OutcomeKind.RESET
        self._tell_broken(Outcome(kind), "the prefill worker closed the connection without an answer")

    def answer_broken(self, reason: str) -> None:
        if self.heir is not None:
            self.heir.answer_broken(reason)
        else:
            self._broken(OutcomeKind.RESET, reason)

    def _broken(self, kind: OutcomeKind, reason: str) -> None:
        self._abandon()
        self.context.count_at(self.worker.slot, at.L_FAILURES)
        self._tell_broken(Outcome(kind), reason)

    def _abandon(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abandon()

    def _tell_broken(self, outcome: Outcome, reason: str) -> None:
        if self.pair is not None:
            self.pair.prefill_broken(outcome, reason)

    def _tell(self, event: Headed | FirstByte | Finished | Broken) -> None:
        if self.pair is not None:
            self.pair.tell(event)
