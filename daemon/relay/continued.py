"""A stream under `streamFailure: continue`: passed on so that it may break, and gone on with by another attempt.

Theory of operation. A `Continued` stands beside the exchange from the head of an answer that can be continued to the
end of the request; other exchanges have none, and pay nothing for it. It joins what the exchange drives (connections,
attempts, the client's chunks) to the `Transcript`, which knows events and text and no I/O (`continuation`).

    exchange                                    continued
    open                   ──>  begin           None: the answer passes as it is
    body_received          ──>  body_received   whole events go out, in chunks of ours
    answer_broken, idle    ──>  resume          `rest` is the body of the next attempt from here on
    open                   ──>  open_rest       that one's answer goes on with the events; `rest` is None again
    answer_complete        ──>  finish          all of the text is told, or the next attempt goes on with it
    cut                    ──>  is_finished     no attempt goes on: whether the client lacks anything

The worker that tells an error in the middle of its stream has broken it as well: the event is withheld, and told only
if no attempt follows. The client's body is kept for as long as a request for the rest may have to be made of it, and
the text of the answer counts with it as held memory; when the stream has become one that cannot be continued, both go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointsman.daemon.errors import bad_answer
from pointsman.daemon.relay.continuation import Resumable, Transcript
from pointsman.daemon.relay.ending import Ending
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.receiver import NOT_TAKEN
from pointsman.daemon.relay.retrying import attempt_failed, next_attempt, release, retry
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind
from pointsman.daemon.routing.request import json_features
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange

ELSEWHERE = b": continued on another worker\n\n"
ON_THE_SAME = b": continued on the same worker\n\n"


class Continued:
    def __init__(self, exchange: Exchange, transcript: Transcript) -> None:
        self._exchange = exchange
        self.transcript = transcript
        self.rest: bytes | None = None
        """the request for the rest of a broken stream, from the break until it is answered"""

    @classmethod
    def begin(cls, exchange: Exchange, head: ResponseHead) -> Continued | None:
        """None: the answer, or what was asked for, cannot be continued, or there is no memory to keep it."""
        request, context = exchange.request, exchange.context
        if not (head.status == 200 and head.is_event_stream and head.is_chunked) or request.is_http_1_0:
            return None
        if head.header(b"content-encoding") is not None or not context.buffers.may_keep():
            return None
        resumable = Resumable.read(exchange.route.path, request.body())
        return None if resumable is None else cls(exchange, Transcript(resumable))

    # --- it comes

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        """What the exchange's does. The chunks are ours; nothing but whole events goes out."""
        exchange, transcript, pieces = self._exchange, self.transcript, list[bytes]()
        end = framing.feed(data, position, pieces)
        exchange.tell_events(transcript.feed(b"".join(pieces)))
        if transcript.failure is not None and self._is_hidden(transcript.failure):
            return NOT_TAKEN
        if transcript.is_resumable:
            exchange.client.hold(exchange.request, transcript.size_bytes)
        elif exchange.request.held_bytes:
            exchange.forget_body()
        return end

    def _is_hidden(self, failure: Outcome) -> bool:
        """The worker tells an error in the middle of its stream: whether another attempt goes on in its place."""
        exchange, transcript = self._exchange, self.transcript
        withheld = transcript.withheld
        step = next_attempt(exchange, failure) if self.resume() else None
        if step is not None:
            exchange.abandon_upstream()
            retry(exchange, step, failure)
            return True
        transcript.give_up()
        exchange.tell_events(transcript.feed(withheld))
        return False

    def finish(self) -> bool:
        """The worker's answer has ended. False: but not its text; what follows is on its way."""
        exchange, transcript = self._exchange, self.transcript
        if not transcript.is_whole and self.resume():
            error = bad_answer("the worker ended its stream in the middle of the text")
            attempt_failed(exchange, Outcome(OutcomeKind.RESET), error)
            return False
        exchange.tell_events(transcript.rest())
        exchange.end_chunks()
        return True

    # --- it has broken

    def resume(self) -> bool:
        """Whether it can be gone on with: then the next attempt does it."""
        exchange = self._exchange
        self.rest = self.transcript.resume(exchange.request.body())
        if self.rest is None:
            return False
        exchange.features = json_features(self.rest)
        return True

    def open_rest(
        self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int, *, has_failed: bool
    ) -> int:
        """The answer to `rest`. Returns what `body_received` does."""
        exchange, context = self._exchange, self._exchange.context
        upstream, worker = exchange.upstream, exchange.worker
        assert upstream is not None and worker is not None
        if has_failed or head.status != 200 or not head.is_event_stream or head.header(b"content-encoding") is not None:
            exchange.upstream = None
            upstream.set_aside(head, framing, data, position)
            release(exchange, Outcome(OutcomeKind.STATUS, 502 if head.status < 400 else head.status))
            found = f"the worker {worker.url} did not go on with the stream (status {head.status})"
            exchange.cut(bad_answer(found), Ending.WORKER_BROKE)
            return NOT_TAKEN
        exchange.framing, self.rest = framing, None
        exchange.continuations += 1
        context.count(at.G_CONTINUATIONS)
        exchange.judge(head.status)
        exchange.watch.has_answer = True
        if exchange.booked is not None:
            context.chooser.first_token(exchange.booked, context.now())
        if exchange.has_paused_upstream:
            upstream.pause_reading()
        elif exchange.client.is_write_paused:
            exchange.pause_upstream()
        exchange.tell_events(ON_THE_SAME if worker.slot in exchange.failed else ELSEWHERE)
        return self.body_received(framing, data, position)

    def is_finished(self) -> bool:
        """No attempt goes on: whether the client has all of the answer nevertheless, which is then at its end."""
        if not self.transcript.is_complete:
            return False
        self._exchange.tell_events(self.transcript.ending())
        self._exchange.end_chunks()
        return True
