"""The wheel against a sorted list, on a virtual clock."""

import math
import random
from collections.abc import Callable

import pytest

from pointsman.daemon.relay.wheel import RESOLUTION_S, Armed, Wheel


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, callback))

    def run_until(self, end: float) -> None:
        while self.timers and min(self.timers, key=lambda timer: timer[0])[0] <= end:
            timer = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1]()
        self.now = max(self.now, end)


class Item(Armed):
    def __init__(self, following: float = math.inf) -> None:
        self.looked: list[float] = []
        self.following = following

    def look(self, now: float) -> float:
        self.looked.append(now)
        return now + self.following


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_never_early_and_late_by_the_resolution(clock: Clock) -> None:
    wheel, rng = Wheel(lambda: clock.now, clock.call_later), random.Random(1)
    items = [(Item(), 100.0 + rng.uniform(-1, 30)) for _ in range(500)]
    for item, at in items:
        wheel.arm(item, at)
    clock.run_until(140.0)
    for item, at in items:
        assert len(item.looked) == 1
        assert max(at, 100.0) <= item.looked[0] <= max(at, 100.0) + 2 * RESOLUTION_S + 1e-9
    assert len(wheel) == 0 and not clock.timers, "an idle wheel stands still"


def test_disarmed_and_armed_again(clock: Clock) -> None:
    wheel, first, second = Wheel(lambda: clock.now, clock.call_later), Item(), Item()
    wheel.arm(first, 101.0)
    wheel.arm(second, 101.0)
    wheel.disarm(first)
    wheel.disarm(first)
    wheel.arm(second, 103.0)
    clock.run_until(102.9)
    assert not first.looked and not second.looked
    clock.run_until(104.0)
    assert len(second.looked) == 1


def test_it_asks_again_when_it_was_told_to(clock: Clock) -> None:
    wheel, item = Wheel(lambda: clock.now, clock.call_later), Item(following=0.5)
    wheel.arm(item, 100.5)
    clock.run_until(105.0)
    assert 8 <= len(item.looked) <= 10
    item.following = math.inf
    clock.run_until(110.0)
    assert len(wheel) == 0 and not clock.timers


def test_a_process_that_was_stopped_catches_up(clock: Clock) -> None:
    wheel, items = Wheel(lambda: clock.now, clock.call_later), [Item() for _ in range(20)]
    for number, item in enumerate(items):
        wheel.arm(item, 100.0 + number)
    clock.now = 200.0
    clock.run_until(200.0)
    assert all(len(item.looked) == 1 for item in items)
