"""The pure model under a virtual clock."""

import random
from collections.abc import Iterator, Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.scripts.simulated_engine.model import (
    Engine,
    EngineLimits,
    EngineRequest,
    EngineSequence,
    RequestTooLargeError,
    SequenceState,
)
from pointsman.scripts.simulated_engine.timing import PRESETS, StepCost

H100 = PRESETS["h100-8b"]
SMALL = EngineLimits(step_tokens=32, max_sequences=4, kv_tokens=160, block_tokens=4)
UNIT = StepCost(1.0, 0.0, 0.0, 0.0, 0.0)


def request(number: int, prompt: int, output: int, blocks: Sequence[int] = ()) -> EngineRequest:
    return EngineRequest(number, prompt, output, blocks)


def run_until_idle(engine: Engine) -> Iterator[tuple[float, list[EngineSequence]]]:
    """(time, finished sequences) of every step."""
    while (now := engine.next_event_time()) is not None:
        yield now, engine.step(now).finished


def chain(path: Sequence[int]) -> list[int]:
    """Chained block hashes of a path of block contents."""
    return [hash(tuple(path[: i + 1])) for i in range(len(path))]


# Prompts that share prefixes: paths in a tree with few branches.
paths = st.lists(st.integers(0, 1), min_size=1, max_size=8)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), paths, st.integers(0, 12)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("step")),
        st.tuples(st.just("flush")),
    ),
    max_size=60,
)


def apply_operation(engine: Engine, operation: tuple[object, ...], number: int) -> None:
    now = engine.next_event_time() or 0.0
    match operation:
        case ("submit", list(path), int(output)):
            engine.submit(request(number, 4 * len(path), output, chain(path)), now)
        case ("abort", int(target)):
            engine.abort(target, now)
        case ("step",):
            engine.step(now)
        case _:
            engine.flush_cache()


@given(operations)
def test_limits_hold_and_all_memory_is_released(script: list[tuple[object, ...]]) -> None:
    engine = Engine(H100, SMALL)
    for number, operation in enumerate(script):
        apply_operation(engine, operation, number)
        gauges, cache = engine.gauges(), engine.cache
        assert gauges.step_prompt_tokens + gauges.step_decoding <= SMALL.step_tokens
        assert gauges.running <= SMALL.max_sequences
        assert cache.private_blocks >= 0
        assert cache.private_blocks + cache.cached_blocks <= cache.capacity_blocks
    for _ in run_until_idle(engine):
        pass
    gauges = engine.gauges()
    assert (gauges.running, gauges.waiting, gauges.kv_blocks_used) == (0, 0, 0)
    totals = engine.totals
    submitted = sum(operation[0] == "submit" for operation in script)
    assert totals.finished + totals.aborted == submitted


@given(operations)
def test_every_sequence_gets_exactly_its_tokens(script: list[tuple[object, ...]]) -> None:
    engine = Engine(H100, SMALL)
    tokens: dict[int, int] = {}
    for number, operation in enumerate(script):
        if operation[0] == "submit":
            apply_operation(engine, operation, number)
    while (now := engine.next_event_time()) is not None:
        result = engine.step(now)
        for sequence in result.tokens:
            tokens[sequence.request.id] = tokens.get(sequence.request.id, 0) + 1
        for sequence in result.finished:
            assert tokens.get(sequence.request.id, 0) == sequence.request.output_tokens
            assert sequence.generated_tokens == sequence.request.output_tokens
            assert sequence.state is SequenceState.FINISHED


class NaiveCache:
    """The definition, spelled out: a list of blocks, the one released first at its head."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: list[int] = []

    def run(self, blocks: Sequence[int], limit: int, needed: int) -> int:
        """One request alone in the engine: its hits, then the cache it leaves."""
        hits = 0
        while hits < limit and blocks[hits] in self.blocks:
            hits += 1
        pinned = list(blocks[:hits])
        others = [b for b in self.blocks if b not in pinned]
        others = others[max(0, len(others) + needed - self.capacity) :]
        computed = list(blocks)
        self.blocks = [b for b in others if b not in computed] + computed[::-1]
        return hits


@given(st.lists(st.tuples(paths, st.integers(0, 3)), max_size=40))
def test_hits_equal_those_of_a_naive_cache(script: list[tuple[list[int], int]]) -> None:
    limits = EngineLimits(step_tokens=1000, max_sequences=4, kv_tokens=48, block_tokens=4)
    engine, naive = Engine(UNIT, limits), NaiveCache(12)
    for number, (path, output) in enumerate(script):
        prompt_tokens = 4 * len(path)
        sequence = engine.submit(request(number, prompt_tokens, output, chain(path)), 0.0)
        for _ in run_until_idle(engine):
            pass
        needed = -(-(prompt_tokens + output) // 4)
        expected = naive.run(chain(path), (prompt_tokens - 1) // 4, needed)
        assert sequence.cached_tokens == 4 * expected


def test_one_prompt_token_is_always_computed() -> None:
    engine = Engine(UNIT, SMALL)
    blocks = chain([1, 2])
    engine.submit(request(1, 8, 0, blocks), 0.0)
    list(run_until_idle(engine))
    sequence = engine.submit(request(2, 8, 0, blocks), 5.0)
    list(run_until_idle(engine))
    assert sequence.cached_tokens == 4


def test_output_blocks_are_hits_of_the_next_turn() -> None:
    engine = Engine(UNIT, SMALL)
    blocks = chain([1, 2, 3, 4])
    engine.submit(request(1, 8, 6, blocks), 0.0)
    list(run_until_idle(engine))
    sequence = engine.submit(request(2, 16, 1, blocks), 100.0)
    list(run_until_idle(engine))
    # 8 + 6 tokens, the last of which was never computed: three full blocks.
    assert sequence.cached_tokens == 12


def test_tail_blocks_are_evicted_first() -> None:
    limits = EngineLimits(kv_tokens=16, block_tokens=4)
    engine = Engine(UNIT, limits)
    long, other = chain([1, 2, 3, 4]), chain([9, 9])
    engine.submit(request(1, 16, 0, long), 0.0)
    list(run_until_idle(engine))
    engine.submit(request(2, 8, 0, other), 10.0)
    list(run_until_idle(engine))
    assert engine.cache.match(long, 4) == 2


def test_blocks_of_running_requests_are_not_evicted() -> None:
    limits = EngineLimits(kv_tokens=32, block_tokens=4)
    engine = Engine(UNIT, limits)
    engine.submit(request(1, 8, 8, chain([1, 2])), 0.0)
    engine.step(1.0)
    waits = engine.submit(request(2, 20, 0, chain([5, 6, 7, 8, 9])), 1.0)
    engine.step(2.0)
    assert waits.state is SequenceState.WAITING
    assert engine.cache.match(chain([1, 2]), 2) == 2
    finished = [s.request.id for _, ended in run_until_idle(engine) for s in ended]
    assert finished == [1, 2]


def test_flushed_blocks_are_not_hit_even_if_still_in_use() -> None:
    engine = Engine(UNIT, SMALL)
    blocks = chain([1, 2, 3])
    engine.submit(request(1, 12, 4, blocks), 0.0)
    engine.step(1.0)
    engine.flush_cache()
    second = engine.submit(request(2, 12, 0, blocks), 1.0)
    list(run_until_idle(engine))
    assert second.cached_tokens == 0
    assert engine.gauges().kv_blocks_used == 0


def test_long_prompts_are_chunked_and_decodes_go_first() -> None:
    limits = EngineLimits(step_tokens=10, kv_tokens=1000, block_tokens=1)
    engine = Engine(UNIT, limits)
    engine.submit(request(1, 5, 20), 0.0)
    engine.step(1.0)
    engine.submit(request(2, 20, 1), 1.5)
    loads = []
    while (now := engine.next_event_time()) is not None and now <= 5.0:
        engine.step(now)
        gauges = engine.gauges()
        loads.append((gauges.step_decoding, gauges.step_prompt_tokens))
    assert loads == [(1, 9), (1, 9), (1, 2), (1, 0)]


def test_step_time_is_the_formula() -> None:
    engine = Engine(StepCost(1.0, 0.1, 0.01, 0.2, 0.05))
    engine.submit(request(1, 10, 3), 0.0)
    # 1 + 0.1 * 10 prompt tokens + 0.01 * 10 * (0 + 5) of context
    assert engine.next_event_time() == pytest.approx(2.5)
    engine.step(2.5)
    # 1 + 0.2 * one sequence + 0.05 * 11 tokens of KV
    assert engine.next_event_time() == pytest.approx(2.5 + 1.75)
    engine.step(4.25)
    assert engine.next_event_time() == pytest.approx(4.25 + 1.8)


def test_a_step_before_its_end_does_nothing() -> None:
    engine = Engine(UNIT)
    engine.submit(request(1, 10, 3), 0.0)
    assert engine.step(0.5).tokens == []
    assert [s.request.id for s in engine.step(1.0).first] == [1]


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(UNIT, SMALL)
    with pytest.raises(RequestTooLargeError):
        engine.submit(request(1, 150, 20), 0.0)
    assert engine.next_event_time() is None


def test_abort_frees_memory_at_once_in_every_state() -> None:
    engine = Engine(UNIT, EngineLimits(step_tokens=8, kv_tokens=80, block_tokens=4))
    engine.submit(request(1, 4, 8, chain([1])), 0.0)
    engine.step(1.0)
    engine.submit(request(2, 40, 4, chain(range(10))), 1.0)
    engine.step(2.0)
    waiting = engine.submit(request(3, 60, 1), 2.0)
    assert waiting.state is SequenceState.WAITING
    for number in (1, 2, 3):
        assert engine.abort(number, 2.5)
        assert not engine.abort(number, 2.5)
    assert engine.gauges().kv_blocks_used == 0
    assert engine.next_event_time() is None


def test_waiting_time_is_that_of_an_m_d_1_queue() -> None:
    """Pollaczek-Khinchine: mean wait = rho * service / (2 * (1 - rho))."""
    engine = Engine(UNIT, EngineLimits(max_sequences=1))
    rng = random.Random(7)
    rho, total = 0.7, 30_000
    now, waits = 0.0, []
    for number in range(total):
        now += rng.expovariate(rho)
        while (due := engine.next_event_time()) is not None and due <= now:
            waits += [(s.admitted_s or 0.0) - s.arrived_s for s in engine.step(due).finished]
        engine.submit(request(number, 10, 0), now)
    assert sum(waits) / len(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.06)


arrivals = st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=12)


def replay(arrivals_s: Sequence[tuple[float, int, int]], *, skips: bool) -> list[tuple[float, ...]]:
    """(id, first token, end) of every request."""
    engine = Engine(H100, EngineLimits(step_tokens=64, max_sequences=4, kv_tokens=400, block_tokens=4))
    ended: list[tuple[float, ...]] = []

    def run(until: float) -> None:
        if skips:
            engine.skip(until)
        while (due := engine.next_event_time()) is not None and due <= until:
            ended.extend((s.request.id, s.first_token_s or 0.0, s.finished_s or 0.0) for s in engine.step(due).finished)
            if skips:
                engine.skip(until)

    now, numbers = 0.0, count()
    for gap, prompt, output in arrivals_s:
        now += gap
        run(now)
        engine.submit(request(next(numbers), prompt, output), now)
    run(1e9)
    return ended


@given(arrivals)
def test_skipped_decode_steps_equal_single_steps(
    arrivals_s: list[tuple[float, int, int]],
) -> None:
    single, skipped = replay(arrivals_s, skips=False), replay(arrivals_s, skips=True)
    assert len(single) == len(skipped) == len(arrivals_s)
    for one, other in zip(single, skipped, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_skip_does_the_bulk_of_a_long_answer_at_once() -> None:
    engine = Engine(H100)
    engine.submit(request(1, 100, 10_000), 0.0)
    engine.step(engine.next_event_time() or 0.0)
    assert engine.skip(1e9) == 9_998
    result = engine.step(engine.next_event_time() or 0.0)
    assert [s.generated_tokens for s in result.finished] == [10_000]
