"""Three times more requests than the engines can take, under a virtual clock: with admission, and without.

The engine shares its speed among what runs on it: work of 0.2 s each, 20 at once at full speed. An answer that comes
more than 2 s after its request is nobody's any more.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest

from pointsman.config.resilience import AdmissionSection
from pointsman.daemon.resilience.admission import POLL_S, Admission
from pointsman.daemon.resilience.waiting import Line, Waiter, WaiterState
from pointsman.daemon.resilience.words import private_words

WORK_S = 0.2
CAPACITY = 20
PEAK = CAPACITY / WORK_S  # requests a second
USEFUL_S = 2.0


class Engine:
    """Processor sharing in virtual time: every running request has got the same amount of work since it began."""

    def __init__(self) -> None:
        self.given_s = 0.0
        self.at = 0.0
        self.running: list[tuple[float, int, Waiter]] = []
        self._serial = count()

    @property
    def speed(self) -> float:
        return min(CAPACITY / len(self.running), 1.0) if self.running else 1.0

    def advance(self, now: float) -> None:
        self.given_s += (now - self.at) * self.speed
        self.at = now

    def start(self, waiter: Waiter, now: float) -> None:
        self.advance(now)
        heapq.heappush(self.running, (self.given_s + WORK_S, next(self._serial), waiter))

    @property
    def next_at(self) -> float:
        return self.at + max(self.running[0][0] - self.given_s, 0.0) / self.speed if self.running else float("inf")

    def finish(self, now: float) -> Waiter:
        self.advance(now)
        return heapq.heappop(self.running)[2]


@dataclass
class Result:
    useful: int = 0
    sent_by: Counter[int] = field(default_factory=Counter)
    shed_of: Counter[int] = field(default_factory=Counter)
    admitted_to_end_s: list[float] = field(default_factory=list)
    most_running: int = 0
    most_waiting: int = 0
    seconds: float = 0.0

    @property
    def goodput(self) -> float:
        return self.useful / self.seconds

    @property
    def shed(self) -> int:
        return self.shed_of.total()

    @property
    def p99_s(self) -> float:
        times = sorted(self.admitted_to_end_s)
        return times[int(0.99 * len(times))]


class Simulation:
    def __init__(self, load: float, limit: int, shards: int, seconds: float = 30.0) -> None:
        section = AdmissionSection(max_concurrent_requests=limit, queue_size=40, queue_timeout_s=1.0)
        self.admission = Admission(section, shards, users=64)
        self.words = private_words(self.admission.words)
        self.lines = [Line(shard) for shard in range(shards)]
        self.engine = Engine()
        self.result = Result(seconds=seconds)
        self.rng = Random(7)
        self.rate = load * PEAK
        self.user: Callable[[], int] = lambda: self.rng.randrange(1, 9)
        self.home: dict[Waiter, Line] = {}
        self.admitted_at: dict[Waiter, float] = {}

    def run(self) -> Result:
        arrival, polls = (
            self.rng.expovariate(self.rate),
            [POLL_S * (i + 1) / len(self.lines) for i in range(len(self.lines))],
        )
        while (now := min(arrival, self.engine.next_at, *polls)) < self.result.seconds:
            if now == arrival:
                self.arrive(now)
                arrival = now + self.rng.expovariate(self.rate)
            elif now == self.engine.next_at:
                self.finish(now)
            else:
                shard = polls.index(now)
                polls[shard] = now + POLL_S
                self.apply(self.admission.poll(self.words, self.lines[shard], now), now)
        return self.result

    def arrive(self, now: float) -> None:
        line = self.rng.choice(self.lines)
        waiter = Waiter(user=self.user(), estimate=100.0)
        self.result.sent_by[waiter.user] += 1
        self.home[waiter] = line
        self.apply(self.admission.enter(self.words, line, now, waiter), now)
        self.result.most_waiting = max(self.result.most_waiting, self.admission.usage(self.words).waiting)

    def finish(self, now: float) -> None:
        waiter = self.engine.finish(now)
        self.result.useful += now - waiter.since <= USEFUL_S
        self.result.admitted_to_end_s.append(now - self.admitted_at.pop(waiter))
        self.apply(self.admission.leave(self.words, self.home.pop(waiter), now, waiter, 120.0), now)

    def apply(self, changed: list[Waiter], now: float) -> None:
        for waiter in changed:
            if waiter.state is WaiterState.ADMITTED:
                self.admitted_at[waiter] = now
                self.engine.start(waiter, now)
            else:
                self.result.shed_of[waiter.user] += 1
        self.result.most_running = max(self.result.most_running, len(self.engine.running))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_goodput_under_three_times_the_load(shards: int) -> None:
    calm = Simulation(load=0.8, limit=CAPACITY, shards=shards).run()
    overloaded = Simulation(load=3.0, limit=CAPACITY, shards=shards).run()
    unprotected = Simulation(load=3.0, limit=0, shards=shards).run()

    assert overloaded.goodput >= 0.9 * PEAK
    assert overloaded.p99_s <= 2 * calm.p99_s
    assert overloaded.most_running <= CAPACITY
    assert overloaded.most_waiting <= 40
    assert overloaded.shed > 0.6 * 2 * PEAK * overloaded.seconds
    assert calm.shed <= 0.01 * 0.8 * PEAK * calm.seconds

    assert unprotected.goodput < 0.3 * PEAK
    assert unprotected.most_running > 50 * CAPACITY


def test_a_heavy_user_does_not_take_the_place_of_a_light_one() -> None:
    """User 1 sends three times what the engines can take, user 2 a tenth of it: user 2 is not among the losers."""
    users = Random(3)
    overloaded = Simulation(load=3.1, limit=CAPACITY, shards=2)
    overloaded.user = lambda: 2 if users.random() < 0.1 / 3.1 else 1
    result = overloaded.run()
    assert result.shed_of[1] > 0.5 * result.sent_by[1]
    assert result.shed_of[2] <= 0.02 * result.sent_by[2]
