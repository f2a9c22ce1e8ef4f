"""Runs one engine model on the event loop: model time to timers, step results to waiting responses."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pointsman.scripts.simulated_engine.model import Engine, EngineRequest, EngineSequence, StepResult

# A loop that was late by more than this does not catch up: the model's clock jumps.
_MAX_LAG_S = 0.05
_MAX_STEPS_PER_TICK = 64


class StepObserver(Protocol):
    def observe_first_token(self, sequence: EngineSequence) -> None: ...
    def observe_end(self, sequence: EngineSequence, finish_reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class Output:
    """One sequence and the text it is going to say."""

    sequence: EngineSequence
    prompt: bytes
    tokens: Sequence[str]
    natural_end: str
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens[: self.sequence.generated_tokens])


@dataclass(slots=True, eq=False)
class Ticket:
    """The sequences of one HTTP request and the one task that waits for them."""

    request_id: str
    streams: bool
    outputs: list[Output] = field(default_factory=list)
    unfinished: int = 0
    _has_news: bool = False
    _waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Returns after news: any token when streaming, otherwise only when all sequences ended."""
        if not self._has_news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_news = False

    async def finish(self) -> None:
        while self.unfinished:
            await self.wait()

    def wake(self) -> None:
        self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True, frozen=True)
class Work:
    """One sequence to run: what it says is known beforehand, when it says it is up to the engine."""

    prompt: bytes
    prompt_tokens: int
    tokens: Sequence[str]
    natural_end: str
    blocks: Sequence[int]


class EngineDriver:
    def __init__(self, engine: Engine, speed: float, observer: StepObserver) -> None:
        self.engine = engine
        self.is_paused = False
        self._loop = asyncio.get_running_loop()
        self._speed = speed
        self._observer = observer
        self._origin_s = self._loop.time()
        self._next_id = 0
        self._outputs: dict[int, tuple[Ticket, Output]] = {}
        self._handle: asyncio.Handle | None = None
        self._handle_due: float | None = None

    @property
    def now(self) -> float:
        """The model's time."""
        return (self._loop.time() - self._origin_s) * self._speed

    def submit(self, ticket: Ticket, works: Sequence[Work]) -> None:
        """Raises RequestTooLargeError; then nothing of the ticket stays in the engine."""
        try:
            for work in works:
                self._submit_one(ticket, work)
        except ValueError:
            self.abort(ticket)
            raise
        self._schedule()

    def abort(self, ticket: Ticket) -> bool:
        """Ends what is still running of a ticket with finish reason `abort`; False if nothing was."""
        ended = False
        for output in ticket.outputs:
            if output.finish_reason is None:
                self._abort_one(output)
                ended = True
        ticket.wake()
        return ended

    def abort_where(self, request_id: str) -> int:
        """Aborts the tickets whose id begins with `request_id`; the empty string means all."""
        tickets = {id(t): t for t, _ in self._outputs.values()}
        return sum(self.abort(ticket) for ticket in tickets.values() if ticket.request_id.startswith(request_id))

    def pause(self) -> None:
        self.is_paused = True
        self._cancel_timer()

    def resume(self) -> None:
        self.is_paused = False
        self._schedule()

    def stop(self) -> None:
        self.is_paused = True
        self._cancel_timer()

    def _submit_one(self, ticket: Ticket, work: Work) -> None:
        self._next_id += 1
        request = EngineRequest(self._next_id, work.prompt_tokens, len(work.tokens), blocks=work.blocks)
        sequence = self.engine.submit(request, self.now)
        output = Output(sequence, work.prompt, work.tokens, work.natural_end)
        ticket.outputs.append(output)
        ticket.unfinished += 1
        self._outputs[request.id] = (ticket, output)

    def _abort_one(self, output: Output) -> None:
        request_id = output.sequence.request.id
        self.engine.abort(request_id, self.now)
        ticket, _ = self._outputs.pop(request_id)
        self._end(ticket, output, "abort")

    def _end(self, ticket: Ticket, output: Output, finish_reason: str) -> None:
        output.finish_reason = finish_reason
        ticket.unfinished -= 1
        self._observer.observe_end(output.sequence, finish_reason)

    def _schedule(self) -> None:
        due = self.engine.next_event_time()
        # After an abort emptied the engine, the timer may still stand for a step that is no more.
        if due == self._handle_due:
            return
        self._cancel_timer()
        if due is None or self.is_paused:
            return
        self._handle_due = due
        if due <= self.now:
            self._handle = self._loop.call_soon(self._tick)
        else:
            self._handle = self._loop.call_at(self._origin_s + due / self._speed, self._tick)

    def _cancel_timer(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
        self._handle_due = None

    def _tick(self) -> None:
        self._handle = None
        self._handle_due = None
        now = self.now
        for _ in range(_MAX_STEPS_PER_TICK):
            due = self.engine.next_event_time()
            if due is None or due > now:
                break
            is_late = now - due > _MAX_LAG_S * self._speed
            self._deliver(self.engine.step(now if is_late else due))
            # Steps without duration: let the event loop run between them, tokens leave one by one.
            if self.engine.next_event_time() == due:
                break
        self._schedule()

    def _deliver(self, result: StepResult) -> None:
        for sequence in result.first:
            self._observer.observe_first_token(sequence)
        for sequence in result.finished:
            ticket, output = self._outputs.pop(sequence.request.id)
            self._end(ticket, output, output.natural_end)
            if ticket.streams or not ticket.unfinished:
                ticket.wake()
        for sequence in result.tokens:
            entry = self._outputs.get(sequence.request.id)
            if entry is not None and entry[0].streams:
                entry[0].wake()
