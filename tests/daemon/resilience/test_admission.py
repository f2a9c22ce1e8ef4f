"""Admission, with a few shards and a clock: who is let in, who waits, who is sent away."""

from collections.abc import Iterable

import pytest

from pointsman.config.resilience import PRIORITIES, AdmissionSection
from pointsman.daemon.resilience.admission import POLL_S, STALE_S, Admission, Refusal, Usage
from pointsman.daemon.resilience.waiting import Line, Waiter, WaiterState
from pointsman.daemon.resilience.words import private_words

START = 1000.0
SYSTEM, INTERACTIVE, DEFAULT, BULK = range(len(PRIORITIES))


class Driven:
    """Shards before one row of words."""

    def __init__(self, shards: int = 1, **section: object) -> None:
        self.shards = shards
        self.set(**{"max_concurrent_requests": 2, "queue_size": 10, **section})
        self.words = private_words(self.admission.words)
        self.lines = [Line(shard) for shard in range(shards)]
        self.home: dict[Waiter, Line] = {}
        self.now = START

    def set(self, **section: object) -> None:
        self.admission = Admission(AdmissionSection(**section), self.shards, users=64)  # type: ignore[arg-type]

    def enter(self, shard: int = 0, **waiter: object) -> Waiter:
        made = Waiter(**waiter)  # type: ignore[arg-type]
        self.home[made] = self.lines[shard]
        changed = self.admission.enter(self.words, self.lines[shard], self.now, made)
        assert (made in changed) is (made.state is not WaiterState.WAITING)
        return made

    def fill(self, shard: int = 0) -> list[Waiter]:
        return [self.enter(shard) for _ in range(self.admission.section.max_concurrent_requests)]

    def leave(self, waiter: Waiter, tokens: float | None = None) -> list[Waiter]:
        return self.admission.leave(self.words, self.home[waiter], self.now, waiter, tokens)

    def poll(self, *shards: int) -> list[Waiter]:
        changed: list[Waiter] = []
        for shard in shards or range(self.shards):
            changed += self.admission.poll(self.words, self.lines[shard], self.now)
        return changed

    def order(self, waiters: Iterable[Waiter]) -> list[Waiter]:
        """In which they are admitted, one at a time."""
        left, order = set(waiters), []
        while left:
            holder = next(waiter for waiter in self.home if waiter.state is WaiterState.ADMITTED)
            self.leave(holder)
            self.poll()
            admitted = [waiter for waiter in left if waiter.state is WaiterState.ADMITTED]
            assert len(admitted) == 1
            left -= set(admitted)
            order += admitted
        return order

    @property
    def usage(self) -> Usage:
        return self.admission.usage(self.words)


def states(waiters: Iterable[Waiter]) -> list[str]:
    return [waiter.state.value for waiter in waiters]


# --- the limit and the queue


def test_so_many_at_once_over_all_shards_and_the_others_wait() -> None:
    driven = Driven(shards=3)
    waiters = []
    for shard in (0, 1, 2, 0):
        waiters.append(driven.enter(shard))
        driven.now += 0.001
    assert states(waiters) == ["admitted", "admitted", "waiting", "waiting"]
    assert driven.usage == Usage(in_use=2, waiting=2)
    driven.leave(waiters[1])
    driven.poll()
    assert states(waiters) == ["admitted", "done", "admitted", "waiting"]


def test_a_permit_is_held_until_its_request_ends_and_given_back_once() -> None:
    driven = Driven()
    first, *_ = driven.fill()
    late = driven.enter()
    driven.now += 59.0
    assert driven.poll() == []
    assert driven.leave(first) == [late]
    assert driven.leave(first) == driven.leave(first) == []
    assert driven.usage.in_use == 2


def test_no_limit_lets_everybody_in() -> None:
    driven = Driven(max_concurrent_requests=0)
    assert {waiter.state for waiter in [driven.enter() for _ in range(500)]} == {WaiterState.ADMITTED}
    assert driven.usage == Usage(500, 0)


def test_a_full_queue_refuses_at_once_whatever_the_shard() -> None:
    driven = Driven(shards=2, queue_size=3)
    driven.fill()
    waiting = [driven.enter(shard) for shard in (0, 1, 0)]
    refused = [driven.enter(shard) for shard in (0, 1)]
    assert states(waiting) == ["waiting"] * 3
    assert states(refused) == ["refused"] * 2
    assert driven.admission.refusal(refused[0]) == Refusal(429, "admission_queue_full", 2.0)
    assert driven.usage == Usage(2, 3)


def test_without_a_queue_it_is_now_or_never() -> None:
    driven = Driven(queue_size=0)
    assert states([*driven.fill(), driven.enter()]) == ["admitted", "admitted", "refused"]


@pytest.mark.parametrize("status", [408, 429, 503])
def test_who_waited_too_long_is_told_so(status: int) -> None:
    driven = Driven(queue_timeout_s=5.0, queue_timeout_status=status)
    driven.fill()
    waiter = driven.enter()
    assert driven.lines[0].next_deadline == START + 5.0
    driven.now += 4.999
    assert driven.poll() == []
    driven.now += 0.001
    assert driven.poll() == [waiter]
    assert driven.admission.refusal(waiter) == Refusal(status, "admission_queue_timeout", 2.0)
    assert driven.usage == Usage(2, 0)


def test_who_leaves_the_queue_makes_room() -> None:
    driven = Driven(queue_size=1)
    driven.fill()
    driven.leave(driven.enter())
    assert driven.usage == Usage(2, 0)
    assert driven.enter().state is WaiterState.WAITING


def test_limits_change_live() -> None:
    driven = Driven()
    first, second = driven.fill()
    waiting = [driven.enter() for _ in range(4)]
    driven.set(max_concurrent_requests=4)
    assert states(driven.poll()) == ["admitted"] * 2
    driven.set(max_concurrent_requests=1)
    driven.leave(first)
    driven.leave(second)
    assert driven.usage == Usage(2, 2)
    driven.leave(waiting[0])
    driven.leave(waiting[1])
    assert driven.usage == Usage(1, 1)
    driven.set(max_concurrent_requests=0)
    driven.poll()
    assert driven.usage == Usage(2, 0)


# --- order


def test_equals_go_in_order_of_arrival_over_all_shards() -> None:
    driven = Driven(shards=3)
    driven.fill()
    waiters = []
    for turn in range(9):
        driven.now += 0.001
        waiters.append(driven.enter(turn * 2 % 3))
    assert driven.order(waiters) == waiters


def test_classes_go_in_order_and_age() -> None:
    driven = Driven(ageing_s=10.0, queue_timeout_s=100.0)
    driven.fill()
    bulk = driven.enter(priority=BULK)
    driven.now += 9.0
    interactive = driven.enter(priority=INTERACTIVE)
    system = driven.enter(priority=SYSTEM)
    driven.now += 12.0
    late_system = driven.enter(priority=SYSTEM)
    driven.now += 10.0
    too_late = driven.enter(priority=SYSTEM)
    assert driven.order([bulk, interactive, system, late_system, too_late]) == [
        system,
        interactive,
        late_system,
        bulk,
        too_late,
    ]


def test_the_least_served_user_goes_first() -> None:
    driven = Driven()
    for user, tokens in ((1, 5000.0), (2, 1000.0), (3, 3000.0)):
        driven.leave(driven.enter(user=user, estimate=100.0), tokens)
    driven.fill()
    heavy, light, middle, new = (driven.enter(user=user) for user in (1, 2, 3, 4))
    assert driven.order([heavy, light, middle, new]) == [new, light, middle, heavy]


def test_real_tokens_count_and_not_the_estimate() -> None:
    driven = Driven()
    driven.leave(driven.enter(user=1, estimate=9000.0), 10.0)
    driven.leave(driven.enter(user=2, estimate=10.0), 9000.0)
    driven.fill()
    waiters = [driven.enter(user=2), driven.enter(user=1)]
    assert driven.order(waiters) == waiters[::-1]


def test_without_usage_the_estimate_stands() -> None:
    driven = Driven()
    driven.leave(driven.enter(user=1, estimate=900.0), None)
    assert driven.admission.accounts.served(driven.words, 1, driven.now) == 900.0


def test_who_was_not_served_is_not_charged() -> None:
    driven = Driven(queue_size=1, queue_timeout_s=5.0)
    driven.fill()
    expired = driven.enter(user=1, estimate=900.0)
    refused = driven.enter(user=2, estimate=900.0, priority=BULK)
    driven.now += 5.0
    driven.poll()
    left = driven.enter(user=3, estimate=900.0)
    driven.leave(left)
    assert states([expired, refused, left]) == ["expired", "refused", "done"]
    assert sum(driven.admission.accounts.served(driven.words, user, driven.now) for user in (1, 2, 3)) < 60.0


def test_a_burst_of_one_user_does_not_stand_before_everybody_else() -> None:
    driven = Driven(queue_size=100)
    driven.fill()
    burst = [driven.enter(user=1, estimate=500.0) for _ in range(50)]
    driven.now += 0.5
    other = driven.enter(user=2, estimate=500.0)
    order = driven.order([*burst, other])
    assert order.index(other) <= 1


def test_a_full_queue_of_one_user_makes_room_for_another() -> None:
    driven = Driven(queue_size=5)
    driven.fill()
    burst = [driven.enter(user=1, estimate=500.0) for _ in range(6)]
    other = driven.enter(user=2, estimate=500.0)
    assert states(burst) == ["waiting"] * 4 + ["displaced", "refused"]
    assert other.state is WaiterState.WAITING
    assert driven.admission.refusal(burst[4]).status == 429
    assert driven.usage == Usage(2, 5)


def test_long_prompts_do_not_starve() -> None:
    """One long prompt against a steady stream of short ones of another user, all served one at a time."""
    driven = Driven(max_concurrent_requests=1, queue_size=1000, ageing_s=10.0, queue_timeout_s=1000.0)
    running = driven.enter(user=2, estimate=100.0)
    driven.leave(driven.enter(user=1), None)
    driven.admission.accounts.charge(driven.words, 1, driven.now, 1e6)
    long = driven.enter(user=1, estimate=100_000.0)
    while long.state is WaiterState.WAITING:
        driven.now += 1.0
        for _ in range(2):  # twice what is served
            driven.enter(user=2, estimate=100.0)
        driven.leave(running, 100.0)
        running = next(waiter for waiter in driven.home if waiter.state is WaiterState.ADMITTED)
    assert driven.now - long.since <= 2 * 10.0 + 2


# --- many shards


def test_a_shard_leaves_the_permit_for_the_better_waiter_of_another() -> None:
    driven = Driven(shards=2)
    first, *_ = driven.fill(0)
    better = driven.enter(1, priority=SYSTEM)
    worse = driven.enter(0)
    assert driven.leave(first) == []
    assert driven.admission.next_shard(driven.words, driven.now) == 1
    assert driven.poll(0) == []
    assert driven.poll(1) == [better]
    assert worse.state is WaiterState.WAITING
    assert driven.admission.next_shard(driven.words, driven.now) is None


def test_with_permits_for_both_nobody_waits_for_the_other() -> None:
    driven = Driven(shards=2)
    holders = driven.fill(0)
    driven.enter(1, priority=SYSTEM)
    worse = driven.enter(0)
    for holder in holders:
        driven.leave(holder)
    assert worse.state is WaiterState.ADMITTED
    assert driven.usage.in_use == 1  # the other one is left for shard 1


def test_a_stopped_shard_keeps_nobody_waiting_for_long() -> None:
    driven = Driven(shards=2)
    first, *_ = driven.fill(0)
    driven.enter(1, priority=SYSTEM)
    worse = driven.enter(0)
    driven.leave(first)
    driven.now += STALE_S
    assert driven.poll(0) == []
    driven.now += POLL_S
    assert driven.poll(0) == [worse]


def test_permits_and_places_of_a_dead_shard_return() -> None:
    driven = Driven(shards=2, queue_size=3)
    driven.fill(1)
    lost = [driven.enter(1) for _ in range(2)]
    waiting = driven.enter(0)
    assert driven.usage == Usage(2, 3)
    driven.admission.reclaim(driven.words, 1)
    assert driven.usage == Usage(0, 1)
    assert driven.poll(0) == [waiting]
    assert states(lost) == ["waiting"] * 2


def test_a_newcomer_does_not_overtake_who_waits_elsewhere() -> None:
    driven = Driven(shards=2)
    first, *_ = driven.fill(0)
    waiting = driven.enter(1)
    driven.now += 0.001
    driven.leave(first)
    newcomer = driven.enter(0)
    assert newcomer.state is WaiterState.WAITING
    assert driven.poll(1) == [waiting]


def test_who_takes_the_place_of_one_who_left_need_not_wait_for_the_next_poll() -> None:
    driven = Driven(shards=2)
    first, *_ = driven.fill(1)
    best = driven.enter(0)
    driven.now += 0.001
    second = driven.enter(0)
    driven.leave(first)
    assert driven.leave(best) == [second]


def test_a_pause_makes_nobody_wait_too_long() -> None:
    line, early, late = Line(0), Waiter(), Waiter()
    early.deadline, late.deadline = 10.0, 20.0
    line.add(early)
    line.add(late)
    line.postpone(100.0)
    assert line.expired(109.9) is None
    assert (line.expired(110.0), line.next_deadline) == (early, 110.0)
    line.remove(early, WaiterState.EXPIRED)
    line.remove(late, WaiterState.EXPIRED)
    assert len(line) == 0
