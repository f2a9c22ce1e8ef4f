"""From a trace to arrivals: which request comes when, so that the fleet is loaded as asked.

*Load* is the GPU-seconds that the trace would take with one pooled prefix cache of all workers' size, over
workers x duration. Open traces are compressed in time to reach it. Closed-loop traces (turns that follow the end of
the previous one after a think time) are replayed by drawing sessions, with replacement and with blocks of their own,
that start as a Poisson process of the rate that reaches it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from pointsman.scripts.replay.traces import Trace, TraceRequest, spread
from pointsman.scripts.simulated_engine.model import EngineLimits
from pointsman.scripts.simulated_engine.timing import StepCost

MAX_THINK_S = 30.0
CLOSED_LOOP_REQUESTS = 9_000
"""Sessions are drawn until there are that many."""
DECODE_BATCH = 32
"""Over how many sequences the fixed cost of a decoding step is spread, in the definition of load."""


@dataclass(slots=True)
class Arrival:
    """`at_s` None: comes `delay_s` after the end of `parent` (a position in the workload)."""

    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    at_s: float | None
    parent: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    block_tokens: int
    arrivals: Sequence[Arrival]


def prefill_s(cost: StepCost, limits: EngineLimits, prompt_tokens: int, cached_tokens: int) -> float:
    """Seconds of a prompt alone in an engine."""
    seconds, done = 0.0, cached_tokens
    while done < prompt_tokens:
        chunk = min(limits.step_tokens, prompt_tokens - done)
        seconds += cost.seconds(chunk, chunk * (done + chunk / 2), 0, 0)
        done += chunk
    return seconds


def busy_s(cost: StepCost, limits: EngineLimits, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
    """GPU-seconds of one request: its prefill, and its share of steps that DECODE_BATCH sequences decode in."""
    context = prompt_tokens + output_tokens / 2
    share_s = cost.base_s / DECODE_BATCH + cost.sequence_s + cost.kv_token_s * context
    return prefill_s(cost, limits, prompt_tokens, cached_tokens) + output_tokens * share_s


def pooled_work_s(
    requests: Iterable[tuple[int, int, Sequence[int]]],
    block_tokens: int,
    cache_tokens: int,
    cost: StepCost,
    limits: EngineLimits,
) -> float:
    """GPU-seconds of (input, output, blocks) in order, with one LRU cache of `cache_tokens`."""
    cache: OrderedDict[int, None] = OrderedDict()
    room = cache_tokens // block_tokens
    total = 0.0
    for input_tokens, output_tokens, blocks in requests:
        hits = 0
        for block in blocks:
            if block not in cache:
                break
            hits += 1
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > room:
            cache.popitem(last=False)
        cached = min(hits * block_tokens, input_tokens - 1)
        total += busy_s(cost, limits, input_tokens, cached, output_tokens)
    return total


def schedule(
    trace: Trace, *, load: float | None, workers: int, seed: int, cost: StepCost, limits: EngineLimits
) -> Workload:
    """The same arguments give the same arrivals, whatever the policy: runs are paired by seed.

    `load` None: an open trace as it was recorded; ValueError for a closed-loop one, which has no clock.
    """
    random = Random(f"{trace.name}:{seed}")
    if not trace.is_closed_loop:
        arrivals = _open(trace, load, workers, random, cost, limits)
    elif load is None:
        raise ValueError(f"{trace.name} has sessions instead of times: it needs a load")
    else:
        arrivals = _closed(trace, load, workers, random, cost, limits)
    return Workload(trace.name, trace.block_tokens, arrivals)


def _arrival(request: TraceRequest, at_s: float | None) -> Arrival:
    return Arrival(request.input_length, max(request.output_length, 1), request.hash_ids, at_s)


def _open(
    trace: Trace, load: float | None, workers: int, random: Random, cost: StepCost, limits: EngineLimits
) -> list[Arrival]:
    ordered = sorted(trace.requests, key=lambda request: request.timestamp)
    times = spread([request.timestamp / 1e3 for request in ordered], random)
    work = pooled_work_s(
        ((r.input_length, r.output_length, r.hash_ids) for r in ordered),
        trace.block_tokens,
        workers * limits.kv_tokens,
        cost,
        limits,
    )
    duration = (times[-1] - times[0]) or 1.0
    scale = 1.0 if load is None else work / (load * workers * duration)
    arrivals = [_arrival(request, (time - times[0]) * scale) for request, time in zip(ordered, times, strict=True)]
    _name_blocks(arrivals, trace.block_tokens)
    return arrivals


def _name_blocks(arrivals: Sequence[Arrival], block_tokens: int) -> None:
    """Where a trace tells no blocks, every prompt is its own: policies that count what they sent need that."""
    if any(arrival.blocks for arrival in arrivals):
        return
    first = 0
    for arrival in arrivals:
        count = -(-arrival.input_tokens // block_tokens)
        arrival.blocks = tuple(range(first, first + count))
        first += count


def _closed(
    trace: Trace, load: float, workers: int, random: Random, cost: StepCost, limits: EngineLimits
) -> list[Arrival]:
    sessions = _sessions(trace)
    holders = Counter(block for session in sessions for block in {b for r in session for b in r.hash_ids})
    drawn: list[list[TraceRequest]] = []
    while sum(map(len, drawn)) < CLOSED_LOOP_REQUESTS:
        drawn.append(random.choice(sessions))
    starts = _poisson(len(drawn), random)
    arrivals: list[Arrival] = []
    ideal: list[tuple[int, float]] = []
    first_free = 1 + max(holders, default=0)
    for number, session in enumerate(drawn):
        renamed: dict[int, int] = {}
        parent: int | None = None
        think = 0.0
        for request in session:
            arrival = _arrival(request, None)
            blocks = []
            for block in request.hash_ids:
                if holders[block] > 1:
                    blocks.append(block)
                else:
                    if block not in renamed:
                        renamed[block] = first_free
                        first_free += 1
                    blocks.append(renamed[block])
            arrival.blocks = tuple(blocks)
            arrival.parent, arrival.delay_s = parent, min(request.delay, MAX_THINK_S)
            think += arrival.delay_s if parent is not None else 0.0
            parent = len(arrivals)
            ideal.append((number, think + 0.02 * request.output_length))
            arrivals.append(arrival)
    scale = _session_scale(arrivals, ideal, starts, trace.block_tokens, load, workers, cost, limits)
    for position, (number, _) in enumerate(ideal):
        if arrivals[position].parent is None:
            arrivals[position].at_s = starts[number] * scale
    return arrivals


def _sessions(trace: Trace) -> list[list[TraceRequest]]:
    grouped: dict[int, list[TraceRequest]] = {}
    for number, request in enumerate(trace.requests):
        grouped.setdefault(-1 - number if request.session is None else request.session, []).append(request)
    return list(grouped.values())


def _poisson(count: int, random: Random) -> list[float]:
    """Arrival times of a Poisson process of rate 1."""
    now, times = 0.0, []
    for _ in range(count):
        times.append(now)
        now += random.expovariate(1.0)
    return times


def _session_scale(
    arrivals: Sequence[Arrival],
    ideal: Sequence[tuple[int, float]],
    starts: Sequence[float],
    block_tokens: int,
    load: float,
    workers: int,
    cost: StepCost,
    limits: EngineLimits,
) -> float:
    """Seconds per unit of `starts`. What a pooled cache hits depends on how sessions interleave: found by iteration."""
    cache_tokens = workers * limits.kv_tokens
    scale = 1e9
    for _ in range(4):
        at = [starts[session] * scale + offset for session, offset in ideal]
        order = sorted(range(len(arrivals)), key=at.__getitem__)
        work = pooled_work_s(
            ((arrivals[i].input_tokens, arrivals[i].output_tokens, arrivals[i].blocks) for i in order),
            block_tokens,
            cache_tokens,
            cost,
            limits,
        )
        scale = work / (load * workers * (starts[-1] or 1.0))
    return scale
