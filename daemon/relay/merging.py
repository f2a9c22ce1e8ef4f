"""Puts the input logprobs of prefill's answer into decode's, on its way to the client (`pd.logprobs`).

Decode's bytes are kept until prefill's answer is whole, which it nearly always is before decode says anything. A plain
answer gets a new length; the events of a stream go out in chunks of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointsman.daemon.pd.logprobs import DONE, PromptLogprobs
from pointsman.daemon.relay.framing import BodyFraming, State
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.upstream import UpstreamConnection

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange

EVENT_END = b"\n\n"


class _Released:
    """In the place of a connection that is its pool's again."""

    def abort(self) -> None:
        pass


class Merging:
    """Of one attempt."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._prompt: PromptLogprobs | None = None
        self._is_known = False
        """prefill's answer is here, readable or not"""
        self._is_complete = False
        """decode's is"""
        self._head: ResponseHead | None = None
        """of a plain answer, held back"""
        self._data = b""

    def prompt_known(self, answer: bytes) -> None:
        """The whole of prefill's answer."""
        self._is_known = True
        try:
            self._prompt = PromptLogprobs(answer, is_stream=self._exchange.features.is_stream)
        except ValueError:
            self._prompt = None  # decode's answer passes as it is
        if self._is_complete:
            self._exchange.answer_complete()
        elif self._head is None and self._data:
            self._pass_events()

    def hold(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        """The head of a plain answer."""
        self._head = head
        return self.body_received(framing, data, position)

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        pieces: list[bytes] = []
        end = framing.feed(data, position, pieces)
        self._data += b"".join(pieces)
        if self._head is None and self._is_known:
            self._pass_events()
        return end

    def finish(self) -> bool:
        """Decode's answer is complete. False: prefill's is not; `answer_complete` is called again when it is."""
        exchange, self._is_complete = self._exchange, True
        if not self._is_known:
            assert exchange.upstream is not None
            released = UpstreamConnection(exchange.upstream.pool)
            released.transport = _Released()  # type: ignore[assignment]
            exchange.upstream = released
            return False
        if self._head is None:
            exchange.tell_events(self._data if self._prompt is None else self._merged(self._data))
            exchange.end_chunks()
            return True
        head, body = self._head, self._data if self._prompt is None else self._prompt.merged(self._data)
        self._head = None
        own = ResponseHead(head.status, head.status_line, head.lines, len(body), False, head.keeps_alive, False)
        assert exchange.pair is not None
        exchange.pair.merging = None
        exchange.open(own, BodyFraming(State.LENGTH, len(body)), body, 0)
        return True

    def _pass_events(self) -> None:
        """Those that are whole."""
        end = self._data.rfind(EVENT_END) + len(EVENT_END)
        if end < len(EVENT_END):
            return
        events, self._data = self._data[:end], self._data[end:]
        self._exchange.tell_events(events if self._prompt is None else self._merged(events))

    def _merged(self, events: bytes) -> bytes:
        assert self._prompt is not None
        lines = []
        for line in events.split(b"\n"):
            data = line.removeprefix(b"data:").strip()
            is_answer = line.startswith(b"data:") and data != DONE
            lines.append(b"data: " + self._prompt.merged(data) if is_answer else line)
        return b"\n".join(lines)
