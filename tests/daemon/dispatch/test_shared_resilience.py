"""The machines over shared memory: what is done natively equals the machines, and processes see one another."""

import random

import pytest

from pointsman.config.resilience import AdmissionSection, BreakerSection, LimitsSection, RetrySection
from pointsman.config.snapshot import Snapshot, WorkerSpec
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.errors import RequestError
from pointsman.daemon.resilience.breaker import UNCOUNTED, Breaker, State, Verdict
from pointsman.daemon.resilience.breaker import WORDS as BREAKER_WORDS
from pointsman.daemon.resilience.budget import WORDS as BUDGET_WORDS
from pointsman.daemon.resilience.budget import RetryBudget
from pointsman.daemon.resilience.waiting import Waiter, WaiterState
from pointsman.daemon.resilience.words import MemoryWords, private_words
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import FAILED, NEUTRAL, SUCCEEDED, Booked, Chooser
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment

WORKERS = tuple(
    WorkerSpec(id=f"w{slot}", url=f"http://x:{slot}", slot=slot, address="127.0.0.1", host="x", port=slot + 1)
    for slot in range(4)
)
POOL = RoutingTable(Snapshot(1, workers=WORKERS)).everyone


def make_state() -> RoutingState:
    state = RoutingState.create(Segment.create(2, 8), IndexSize(2, 512), 2**20)
    for worker in WORKERS:
        state.segment.set_status(worker.slot, at.STATUS_UP)
    return state


def chooser_of(state: RoutingState) -> Chooser:
    layout, chain = state.segment.layout, state.index.chain()
    ring, gauges = layout.decision_ring(0), layout.gauge(0, 0)
    words = (layout.budget, layout.breakers)
    return Chooser(state.words, state.bookings, state.index, chain, 0, state.ghost, gauges, ring, 1024, *words)


def row(state: RoutingState, first: int, count: int) -> MemoryWords:
    return MemoryWords(state.segment.cells[first : first + count], state.segment.reals[first : first + count])


@pytest.mark.parametrize("seed", range(20))
def test_native_deposits_are_the_budgets(seed: int) -> None:
    rng, state = random.Random(seed), make_state()
    chooser, section = (
        chooser_of(state),
        RetrySection(budget_ratio=rng.uniform(0, 2), budget_min_per_s=rng.choice([0, 3])),
    )
    native, plain = row(state, state.segment.layout.budget, BUDGET_WORDS), private_words(BUDGET_WORDS)
    budget, now = RetryBudget(section), 100.0
    for _ in range(300):
        now += rng.choice([0.0, 0.001, 0.3, 4.0])
        if rng.random() < 0.6:
            chooser.deposit(section.budget_ratio, section.budget_min_per_s, now)
            budget.deposit(plain, now)
        else:
            assert budget.withdraw(native, now) == budget.withdraw(plain, now)
        assert budget.balance(native, now) == pytest.approx(budget.balance(plain, now))


@pytest.mark.parametrize("seed", range(20))
def test_native_successes_are_the_breakers(seed: int) -> None:
    rng, state = random.Random(seed), make_state()
    section = BreakerSection(failure_threshold=4, success_threshold=2, timeout_s=1.0, window_s=8.0, min_requests=6)
    shared, chooser, breaker = SharedResilience(state, 0), chooser_of(state), Breaker(section)
    shared.use(section, AdmissionSection())
    chooser.breaker_width_s = shared.breaker_width_s
    native = row(state, state.segment.layout.breaker(1), BREAKER_WORDS)
    plain, now = private_words(BREAKER_WORDS), 50.0
    for _ in range(400):
        now += rng.choice([0.0, 0.01, 0.7])
        ticket = breaker.acquire(plain, now, 0)
        if ticket is None:
            assert shared.acquire(1, now) is None
            continue
        booked = Booked(WORKERS[1], 1, 1, 1, False)
        with state.locked():
            chooser.book(booked, now, False)
        if not shared.is_closed(1):
            acquired = shared.acquire(1, now)
            assert acquired == ticket
            booked.ticket = ticket
        assert booked.ticket == ticket
        verdict, name = rng.choice(
            [(NEUTRAL, Verdict.NEUTRAL), (FAILED, Verdict.FAILURE), (SUCCEEDED, Verdict.SUCCESS)]
        )
        breaker.record(plain, now, ticket, name)
        if chooser.finish(booked, now, -1, True, verdict) or not shared.is_closed(1):
            shared.record(1, ticket, name, now)
        assert [native.get_int(i) for i in range(BREAKER_WORDS)] == [plain.get_int(i) for i in range(BREAKER_WORDS)]
        assert shared.is_quiet() == (plain.get_int(0) == State.CLOSED)


def opened(shared: SharedResilience, *slots: int, now: float) -> None:
    for slot in slots:
        for _ in range(10):
            shared.record(slot, shared.acquire(slot, now) or 0, Verdict.FAILURE, now)


def test_one_process_opens_it_and_the_other_sees_it() -> None:
    state = make_state()
    one, other = SharedResilience(state, 0), SharedResilience(state, 1)
    assert one.is_quiet() and other.fit(POOL, (), 5.0).pool is POOL
    opened(one, 2, now=5.0)
    assert not other.is_quiet()
    assert other.fit(POOL, (), 5.0).pool.slots == (0, 1, 3)
    assert other.fit(POOL, {0}, 5.0).pool.slots == (1, 3)
    assert other.fit(POOL, {0, 1, 3}, 5.0).pool.slots == (0, 1, 3), "as long as another is eligible"
    assert other.has_other(POOL, {0, 1}, 5.0) and not other.has_other(POOL, {0, 1, 3}, 5.0)


def test_half_of_them_stay_and_those_are_overruled() -> None:
    state = make_state()
    shared = SharedResilience(state, 0)
    opened(shared, 0, 1, 2, 3, now=5.0)
    fit = shared.fit(POOL, (), 6.0)
    assert len(fit.pool.slots) == 2 and fit.overruled == set(fit.pool.slots)


def test_a_sole_workers_breaker_opens_for_all() -> None:
    state = make_state()
    shared = SharedResilience(state, 1)
    opened(SharedResilience(state, 0), 0, now=5.0)
    with pytest.raises(RequestError) as caught:
        shared.fit(POOL.only([0]), (), 7.5)
    assert (caught.value.status, caught.value.code) == (503, "circuit_open")
    assert dict(caught.value.headers)["Retry-After"] == "58"


def test_probes_permits_and_places_of_a_dead_shard_come_back() -> None:
    state = make_state()
    dead, other = SharedResilience(state, 1), SharedResilience(state, 0)
    for each in (dead, other):
        each.use(BreakerSection(), AdmissionSection(max_concurrent_requests=1, queue_size=5))
    opened(dead, 0, now=5.0)
    assert dead.acquire(0, 100.0) not in (None, UNCOUNTED)
    assert other.acquire(0, 100.0) is None
    first, second = Waiter(), Waiter()
    assert dead.enter(first, 100.0) == [first] and dead.enter(second, 100.0) == []
    third = Waiter()
    other.enter(third, 100.0)
    assert (other.usage().in_use, other.usage().waiting) == (1, 2)
    assert other.reclaim_shard(1)
    assert other.acquire(0, 100.0) is not None
    assert other.poll(100.1) == [third] and third.state is WaiterState.ADMITTED
    assert (other.usage().in_use, other.usage().waiting) == (1, 0)


def test_a_slot_comes_back_with_a_closed_breaker() -> None:
    state = make_state()
    shared = SharedResilience(state, 0)
    opened(shared, 3, now=5.0)
    assert state.clear_worker(3)
    assert shared.is_quiet() and shared.is_closed(3)


def test_rates_are_one_for_all_processes() -> None:
    state = make_state()
    one, other = SharedResilience(state, 0), SharedResilience(state, 1)
    limits = LimitsSection(requests_per_second=2.0)
    taken = [each.take_request("p", limits, 10.0) for each in (one, other, one)]
    assert taken[:2] == [0.0, 0.0] and taken[2] == pytest.approx(0.5)
    assert other.take_request("q", limits, 10.0) == 0.0


def test_rates_of_keys_are_one_for_all_processes_and_apart_from_those_of_profiles() -> None:
    state = make_state()
    one, other = SharedResilience(state, 0), SharedResilience(state, 1)
    limits = LimitsSection(key_requests_per_minute=2.0, key_tokens_per_minute=600.0, requests_per_second=1.0)
    taken = [each.take_for_key(7, limits, 10.0, 100.0) for each in (one, other, one)]
    assert taken[:2] == [0.0, 0.0] and taken[2] == pytest.approx(30.0)
    assert other.take_for_key(8, limits, 10.0, 600.0) == 0.0
    assert one.take_for_key(8, limits, 10.0, 1.0) == pytest.approx(0.1)
    other.correct_for_key(8, limits, 10.0, -600.0)
    assert one.take_for_key(8, limits, 10.0, 1.0) == 0.0
    assert one.take_request("7", limits, 10.0) == 0.0


def test_settings_change_under_way_and_free_permits_count() -> None:
    state = make_state()
    shared = SharedResilience(state, 0)
    assert shared.is_unlimited()
    shared.enter_freely()
    shared.use(BreakerSection(), AdmissionSection(max_concurrent_requests=1, queue_size=0))
    waiter = Waiter()
    assert shared.enter(waiter, 1.0) == [waiter] and waiter.state is WaiterState.REFUSED
    shared.leave_freely()
    again = Waiter()
    assert shared.enter(again, 1.0) == [again] and again.state is WaiterState.ADMITTED
