"""A process dies between any two stores of any call: what it leaves is a state that the others can go on with.

The words count stores and stop taking them after the n-th one, as memory does when its writer is killed.
"""

from collections.abc import Callable
from random import Random

import pytest

from pointsman.config.resilience import AdmissionSection, BreakerSection, LimitsSection, RetrySection
from pointsman.daemon.resilience import breaker as of_breaker
from pointsman.daemon.resilience import budget as of_budget
from pointsman.daemon.resilience.accounts import Accounts
from pointsman.daemon.resilience.admission import Admission
from pointsman.daemon.resilience.breaker import Breaker, State, Verdict
from pointsman.daemon.resilience.budget import RetryBudget
from pointsman.daemon.resilience.rates import KeyRates
from pointsman.daemon.resilience.table import Table
from pointsman.daemon.resilience.waiting import Line, Waiter
from pointsman.daemon.resilience.words import WORD_BYTES, MemoryWords, Words

START = 1000.0


class Killed(Exception):
    pass


class MortalWords:
    """Words whose writer dies before the store number `life` (from 0)."""

    def __init__(self, memory: bytearray, life: int) -> None:
        view = memoryview(memory)
        self._words = MemoryWords(view.cast("q"), view.cast("d"))
        self._life = life

    def get_int(self, index: int, /) -> int:
        return self._words.get_int(index)

    def get_real(self, index: int, /) -> float:
        return self._words.get_real(index)

    def set_int(self, index: int, value: int, /) -> None:
        self._store()
        self._words.set_int(index, value)

    def set_real(self, index: int, value: float, /) -> None:
        self._store()
        self._words.set_real(index, value)

    def _store(self) -> None:
        if not self._life:
            raise Killed
        self._life -= 1


def torn(memory: bytearray, call: Callable[..., object], *args: object) -> list[MemoryWords]:
    """What `call(words, *args)` leaves behind in `memory` when it is cut before each of its stores."""
    left = []
    for life in range(1000):
        copy = bytearray(memory)
        view = memoryview(copy)
        try:
            call(MortalWords(copy, life), *args)
        except Killed:
            left.append(MemoryWords(view.cast("q"), view.cast("d")))
            continue
        return left
    raise AssertionError("too many stores")


def whole(memory: bytearray) -> MemoryWords:
    view = memoryview(memory)
    return MemoryWords(view.cast("q"), view.cast("d"))


SECTION = BreakerSection(failure_threshold=2, success_threshold=2, timeout_s=10.0, probe_lease_s=5.0, window_s=80.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_breaker_recovers_and_never_has_two_probes(seed: int) -> None:
    rng, breaker, now = Random(seed), Breaker(SECTION), START
    memory = bytearray(of_breaker.WORDS * WORD_BYTES)
    words = whole(memory)
    for _ in range(60):
        now += rng.choice([0.1, 1.0, 6.0, 11.0])
        verdict = rng.choice([Verdict.SUCCESS, Verdict.FAILURE, Verdict.FAILURE, Verdict.NEUTRAL])
        serial = words.get_int(of_breaker.B_SERIAL)
        for left in (
            *torn(memory, breaker.acquire, now, 1),
            *torn(memory, breaker.record, now, serial, verdict),
        ):
            check_breaker(breaker, left, now)
        ticket = breaker.acquire(words, now, 0)
        if ticket is not None:
            breaker.record(words, now, ticket, verdict)


def check_breaker(breaker: Breaker, words: MemoryWords, now: float) -> None:
    breaker.release_shard(words, 0)
    breaker.release_shard(words, 1)
    later = now + SECTION.timeout_s + SECTION.probe_lease_s
    for _ in range(SECTION.success_threshold + 1):
        ticket = breaker.acquire(words, later, 2)
        assert ticket is not None
        if breaker.view(words, later).state is State.HALF_OPEN:
            assert breaker.acquire(words, later, 3) is None
        breaker.record(words, later, ticket, Verdict.SUCCESS)
    view = breaker.view(words, later)
    assert view.state is State.CLOSED
    assert 0 <= view.failures <= view.requests


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_is_never_made_twice(seed: int) -> None:
    rng, now = Random(seed), START
    budget = RetryBudget(RetrySection())
    memory = bytearray(of_budget.WORDS * WORD_BYTES)
    words = whole(memory)
    for _ in range(200):
        now += rng.random()
        before = budget.balance(words, now)
        call = rng.choice([budget.deposit, budget.withdraw])
        for left in torn(memory, call, now):
            assert -1e-9 <= budget.balance(left, now) <= before + 1e-6
        call(words, now)


@pytest.mark.parametrize("seed", range(10))
def test_accounts_stay_accounts(seed: int) -> None:
    rng, now = Random(seed), START
    accounts = Accounts(0, 8, 60.0)
    memory = bytearray(accounts.words * WORD_BYTES)
    for _ in range(60):
        now += rng.random() * 30
        user, tokens = rng.randrange(20), rng.uniform(-500, 1000)
        for left in torn(memory, accounts.charge, user, now, tokens):
            for someone in range(20):
                assert accounts.served(left, someone, now) >= 0.0
                assert 0.0 <= accounts.share(left, someone, now) <= 1.0
        accounts.charge(whole(memory), user, now, tokens)


def test_nobody_inherits_the_debt_of_a_forgotten_key() -> None:
    limits = LimitsSection(key_requests_per_minute=1.0)
    rates = KeyRates(Table(0, 8))
    memory = bytearray(rates.table.words * WORD_BYTES)
    words = whole(memory)
    for key in range(1, 9):
        rates.take(words, key, limits, START, 1.0)
    for left in torn(memory, rates.take, 100, limits, START, 1.0):
        assert rates.take(left, 100, limits, START, 1.0) == 0.0 or rates.table.find(left, 100) is not None


@pytest.mark.parametrize("seed", range(10))
def test_admission_is_whole_again_once_the_dead_shard_is_reaped(seed: int) -> None:
    rng, now = Random(seed), START
    section = AdmissionSection(max_concurrent_requests=3, queue_size=4, queue_timeout_s=3.0)
    admission = Admission(section, shards=2, users=8)
    memory = bytearray(admission.words * WORD_BYTES)
    words = whole(memory)
    lines = [Line(0), Line(1)]
    present: list[tuple[int, Waiter]] = []

    def enter_on_the_doomed(words: Words, now: float) -> None:
        admission.enter(words, Line(1), now, Waiter(1))

    for _ in range(80):
        now += rng.random()
        for left in torn(memory, enter_on_the_doomed, now):
            admission.reclaim(left, 1)
            usage = admission.usage(left)
            held = [waiter.state.value for shard, waiter in present if shard == 0]
            assert (usage.in_use, usage.waiting) == (held.count("admitted"), held.count("waiting"))
        shard = rng.randrange(2)
        if present and rng.random() < 0.5:
            home, waiter = present.pop(rng.randrange(len(present)))
            admission.leave(words, lines[home], now, waiter, 50.0)
        else:
            present.append((shard, Waiter(rng.randrange(4), estimate=10.0)))
            admission.enter(words, lines[shard], now, present[-1][1])
