"""A continuous-batching engine as a pure model: no clock, no event loop, no I/O.

Theory of operation. The engine works in steps. A step is composed when the previous one ends: first one
token for every decoding sequence, then prompt chunks, first come first served, up to the token budget;
waiting requests are admitted while sequences, budget and KV memory allow, and find their cached prefix at
that moment. Its duration follows from what it contains (timing.py). The step that computes the last prompt
token also yields the first output token.

Memory for prompt and output is reserved at admission, so nothing is ever preempted; a request that does not
fit waits at the head of the line. At least one prompt token is always computed, as in vLLM.

The caller owns time: `submit` and `abort` may come at any moment, `step(now)` is to be called once
`next_event_time()` is reached. A server calls it from a timer, a trace replay from a virtual clock.
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from pointsman.scripts.simulated_engine.prefix_cache import PrefixCache
from pointsman.scripts.simulated_engine.timing import StepCost


@dataclass(slots=True, frozen=True)
class EngineLimits:
    step_tokens: int = 2048
    max_sequences: int = 256
    kv_tokens: int = 400_000
    block_tokens: int = 16


@dataclass(slots=True, frozen=True)
class EngineRequest:
    """`blocks`: chained hashes of the full blocks of prompt and, if it is known, of the output after it.

    `output_tokens` 0 is a request that ends with its prompt (embeddings, scores).
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()


class RequestTooLargeError(ValueError):
    """Prompt and output together exceed the KV memory of the engine."""


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class EngineSequence:
    """A request inside the engine. Callers read it; only the engine writes it."""

    request: EngineRequest
    arrived_s: float
    state: SequenceState = SequenceState.WAITING
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    committed_blocks: int = 0
    private_blocks: int = 0


@dataclass(slots=True, frozen=True)
class StepResult:
    """`tokens` are the sequences that got a token, `first` those for which it was the first one."""

    first: list[EngineSequence] = field(default_factory=list)
    tokens: list[EngineSequence] = field(default_factory=list)
    finished: list[EngineSequence] = field(default_factory=list)


@dataclass(slots=True)
class EngineTotals:
    steps: int = 0
    admitted: int = 0
    finished: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


@dataclass(slots=True, frozen=True)
class EngineGauges:
    running: int
    waiting: int
    waiting_tokens: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_usage: float
    step_prompt_tokens: int
    step_decoding: int


@dataclass(slots=True)
class _Step:
    ends_s: float = 0.0
    chunks: list[tuple[EngineSequence, int]] = field(default_factory=list)
    decoding: list[EngineSequence] = field(default_factory=list)
    prompt_tokens: int = 0
    token_context: float = 0.0
    # Nobody can join the next step either, unless a sequence leaves first.
    is_closed: bool = False

    def add_chunk(self, sequence: EngineSequence, budget: int) -> None:
        todo = sequence.request.prompt_tokens - sequence.computed_tokens
        chunk = min(budget, todo)
        self.chunks.append((sequence, chunk))
        self.prompt_tokens += chunk
        # A token attends on average to half of its own chunk.
        self.token_context += chunk * (sequence.computed_tokens + chunk / 2)


class Engine:
    def __init__(self, cost: StepCost, limits: EngineLimits | None = None) -> None:
        self.cost = cost
        self.limits = limits or EngineLimits()
        self.totals = EngineTotals()
        self.cache = PrefixCache(self.limits.kv_tokens // self.limits.block_tokens)
        self._waiting: OrderedDict[int, EngineSequence] = OrderedDict()
        self._prefilling: dict[int, EngineSequence] = {}
        self._decoding: dict[int, EngineSequence] = {}
        self._decoding_context = 0
        self._step: _Step | None = None

    def submit(self, request: EngineRequest, now: float) -> EngineSequence:
        """Queues the request; an idle engine begins a step with it at once."""
        if request.prompt_tokens < 1:
            raise ValueError("a prompt has at least one token")
        if self._blocks_needed(request) > self.cache.capacity_blocks:
            raise RequestTooLargeError(
                f"{request.prompt_tokens} + {request.output_tokens} tokens exceed "
                f"the KV memory of {self.limits.kv_tokens} tokens"
            )
        if self.find(request.id) is not None:
            raise ValueError(f"request {request.id} is already in the engine")
        sequence = EngineSequence(request, arrived_s=now)
        self._waiting[request.id] = sequence
        if self._step is None:
            self._begin_step(now)
        elif len(self._waiting) == 1:
            self._step.is_closed = False
        return sequence

    def next_event_time(self) -> float | None:
        """When the running step ends; None while the engine is idle."""
        return None if self._step is None else self._step.ends_s

    def step(self, now: float) -> StepResult:
        """Ends the running step if it is due, and begins the next one at `now`."""
        step = self._step
        if step is None or now < step.ends_s:
            return StepResult()
        self._step = None
        self.totals.steps += 1
        result = StepResult()
        self._end_decoding(step, now, result)
        self._end_chunks(step, now, result)
        self._begin_step(now)
        return result

    def skip(self, until: float) -> int:
        """Does in closed form the steps that end by `until` and in which nothing but decoding happens.

        Their tokens are counted but not reported, so this is for callers that want only first tokens and
        ends. Returns the number of steps skipped; the one that is next to run is still to be stepped.
        """
        step = self._step
        if step is None or step.chunks or not step.is_closed or step.ends_s > until:
            return 0
        decoding = self._decoding.values()
        remaining = min(s.request.output_tokens - s.generated_tokens for s in decoding)
        first_s = self.cost.seconds(0, 0.0, len(decoding), self._decoding_context)
        growth_s = self.cost.kv_token_s * len(decoding)
        count = min(remaining - 1, 1 + _count_steps(first_s + growth_s, growth_s, until - step.ends_s))
        if count < 1:
            return 0
        for sequence in decoding:
            sequence.generated_tokens += count
        self._decoding_context += count * len(decoding)
        self.totals.generated_tokens += count * len(decoding)
        self.totals.steps += count
        step.ends_s += count * first_s + growth_s * count * (count + 1) / 2
        return count

    def abort(self, request_id: int, now: float) -> bool:
        """Takes the sequence out wherever it is; its memory is free at once. False if it is unknown."""
        sequence = self._waiting.pop(request_id, None)
        if sequence is None:
            sequence = self.find(request_id)
            if sequence is None:
                return False
            self._leave(sequence)
        if self._step is not None:
            self._step.is_closed = False
        sequence.state = SequenceState.ABORTED
        sequence.finished_s = now
        self.totals.aborted += 1
        # A step whose every sequence has left still takes its time, unless nothing else is here.
        if not (self._waiting or self._prefilling or self._decoding):
            self._step = None
        return True

    def find(self, request_id: int) -> EngineSequence | None:
        return self._decoding.get(request_id) or self._prefilling.get(request_id) or self._waiting.get(request_id)

    def sequences(self) -> Iterator[EngineSequence]:
        """Everything in the engine: decoding, prefilling, waiting."""
        yield from self._decoding.values()
        yield from self._prefilling.values()
        yield from self._waiting.values()

    def flush_cache(self) -> None:
        self.cache.flush()

    def gauges(self) -> EngineGauges:
        cache, step = self.cache, self._step
        return EngineGauges(
            running=self.running,
            waiting=len(self._waiting),
            waiting_tokens=sum(s.request.prompt_tokens for s in self._waiting.values()),
            kv_blocks_used=cache.used_blocks,
            kv_blocks_cached=cache.cached_blocks,
            kv_usage=cache.used_blocks / cache.capacity_blocks,
            step_prompt_tokens=0 if step is None else step.prompt_tokens,
            step_decoding=0 if step is None else len(step.decoding),
        )

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def _blocks_needed(self, request: EngineRequest) -> int:
        tokens = request.prompt_tokens + request.output_tokens
        return -(-tokens // self.limits.block_tokens)

    def _begin_step(self, now: float) -> None:
        if not (self._waiting or self._prefilling or self._decoding):
            return
        step = _Step(decoding=list(self._decoding.values()))
        self._add_chunks(step, now)
        step.is_closed = not step.chunks
        step.ends_s = now + self.cost.seconds(
            step.prompt_tokens, step.token_context, len(step.decoding), self._decoding_context
        )
        self._step = step

    def _add_chunks(self, step: _Step, now: float) -> None:
        budget = self.limits.step_tokens - len(step.decoding)
        for sequence in self._prefilling.values():
            if budget <= step.prompt_tokens:
                return
            step.add_chunk(sequence, budget - step.prompt_tokens)
        while self._waiting and budget > step.prompt_tokens:
            sequence = next(iter(self._waiting.values()))
            if not self._admit(sequence, now):
                return
            step.add_chunk(sequence, budget - step.prompt_tokens)

    def _admit(self, sequence: EngineSequence, now: float) -> bool:
        if self.running >= self.limits.max_sequences:
            return False
        request = sequence.request
        block_tokens = self.limits.block_tokens
        matched = self.cache.match(request.blocks, (request.prompt_tokens - 1) // block_tokens)
        private = self._blocks_needed(request) - matched
        if not self.cache.admit(request.blocks, matched, private):
            return False
        self._waiting.popitem(last=False)
        self._prefilling[request.id] = sequence
        sequence.state = SequenceState.RUNNING
        sequence.admitted_s = now
        sequence.committed_blocks = matched
        sequence.private_blocks = private
        sequence.cached_tokens = sequence.computed_tokens = matched * block_tokens
        self.totals.admitted += 1
        self.totals.prompt_tokens += request.prompt_tokens
        self.totals.cached_tokens += sequence.cached_tokens
        return True

    def _end_decoding(self, step: _Step, now: float, result: StepResult) -> None:
        for sequence in step.decoding:
            if sequence.state is not SequenceState.RUNNING:
                continue
            sequence.generated_tokens += 1
            self._decoding_context += 1
            result.tokens.append(sequence)
            if sequence.generated_tokens >= sequence.request.output_tokens:
                self._finish(sequence, now, result)
        self.totals.generated_tokens += len(result.tokens)

    def _end_chunks(self, step: _Step, now: float, result: StepResult) -> None:
        for sequence, chunk in step.chunks:
            if sequence.state is not SequenceState.RUNNING:
                continue
            sequence.computed_tokens += chunk
            self._commit(sequence)
            if sequence.computed_tokens == sequence.request.prompt_tokens:
                self._end_prompt(sequence, now, result)

    def _end_prompt(self, sequence: EngineSequence, now: float, result: StepResult) -> None:
        if sequence.request.output_tokens == 0:
            self._finish(sequence, now, result)
            return
        sequence.generated_tokens = 1
        sequence.first_token_s = now
        self.totals.generated_tokens += 1
        result.first.append(sequence)
        result.tokens.append(sequence)
        if sequence.request.output_tokens == 1:
            self._finish(sequence, now, result)
            return
        del self._prefilling[sequence.request.id]
        self._decoding[sequence.request.id] = sequence
        self._decoding_context += sequence.request.prompt_tokens + 1

    def _finish(self, sequence: EngineSequence, now: float, result: StepResult) -> None:
        self._leave(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finished_s = now
        self.totals.finished += 1
        result.finished.append(sequence)

    def _leave(self, sequence: EngineSequence) -> None:
        request = sequence.request
        if self._decoding.pop(request.id, None) is not None:
            self._decoding_context -= request.prompt_tokens + sequence.generated_tokens
        else:
            del self._prefilling[request.id]
        self._commit(sequence)
        held = request.blocks[: sequence.committed_blocks]
        self.cache.release(held, sequence.private_blocks)
        sequence.private_blocks = 0

    def _commit(self, sequence: EngineSequence) -> None:
        """Makes every block that is now fully computed hittable, output blocks included."""
        # The last generated token is sampled, but not yet in the KV memory.
        tokens = sequence.computed_tokens + max(sequence.generated_tokens - 1, 0)
        blocks = sequence.request.blocks
        full = min(tokens // self.limits.block_tokens, len(blocks))
        while sequence.committed_blocks < full:
            if not self.cache.commit(blocks[sequence.committed_blocks]):
                return
            sequence.committed_blocks += 1
            sequence.private_blocks -= 1


def _count_steps(first_s: float, growth_s: float, room_s: float) -> int:
    """How many steps fit into `room_s` if the first takes `first_s` and each next one `growth_s` more."""
    if first_s <= 0.0:
        return sys.maxsize
    if growth_s <= 0.0:
        return int(room_s / first_s)
    # count * first + growth * count * (count - 1) / 2 = room
    half = first_s - growth_s / 2
    count = int((math.sqrt(half * half + 2 * growth_s * room_s) - half) / growth_s)
    return max(count, 0)
