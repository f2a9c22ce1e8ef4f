"""How many lines may be under way: live traffic first."""

from __future__ import annotations

import asyncio
import time

from pointsman.daemon.batches.allowance import Allowance
from pointsman.daemon.batches.concurrency import HOLD_S, LEAST_SAMPLES, TICK_S, Concurrency, Seen
from pointsman.daemon.batches.live import Live, LiveTraffic
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import EngineSignals, Segment


class Run:
    """Ticks with a batch that always uses its limit."""

    def __init__(self, most: int = 64) -> None:
        self.concurrency = Concurrency(most)
        self.now = 100.0

    def tick(self, times: int = 1, **seen: object) -> int:
        for _ in range(times):
            self.now += TICK_S
            self.concurrency.tick(Seen(self.concurrency.limit, **seen), self.now)  # type: ignore[arg-type]
        return self.concurrency.limit

    def live(self, first_byte_s: float, times: int = 1) -> int:
        return self.tick(times, live_streams=LEAST_SAMPLES, live_first_byte_s=LEAST_SAMPLES * first_byte_s)


def test_it_grows_to_its_bound_while_nobody_minds() -> None:
    run = Run(most=64)
    assert run.tick(200) == 64


def test_it_does_not_grow_while_it_is_not_used() -> None:
    concurrency = Concurrency(64)
    for now in range(100):
        assert concurrency.tick(Seen(in_flight=1), float(now)) == concurrency.limit
    assert concurrency.limit == 4


def test_crowding_halves_it_about_once_in_a_while_and_never_below_one() -> None:
    run = Run()
    run.tick(200)
    assert run.tick(1, crowded=3) == 38
    assert run.tick(int(HOLD_S / TICK_S) - 1, crowded=3) == 38, "what was cut needs time to show"
    assert run.tick(200, crowded=1) == 1


def test_after_resistance_it_grows_by_one() -> None:
    run = Run()
    run.tick(200)
    low = run.tick(1, crowded=1)
    run.tick(int(HOLD_S / TICK_S))
    assert run.tick(5) <= low + 6


def test_engines_with_a_queue_get_no_more() -> None:
    run = Run()
    run.tick(200)
    assert run.tick(1, engine_waiting=2.0, is_waiting_new=True) == 38
    assert run.tick(40, engine_waiting=2.0) == 38, "one report counts once, and nothing grows before the next"
    assert run.tick(40, engine_waiting=2.0, is_waiting_new=True) == 1
    assert run.tick(40, engine_waiting=0.2, is_waiting_new=True) > 20


def test_live_traffic_that_slows_down_is_given_way() -> None:
    run = Run()
    assert run.live(0.050, 120) == 64
    assert run.live(0.120, 10) < 30
    assert run.live(0.050, 120) == 64


def test_a_load_that_has_changed_for_good_is_the_usual_one_after_a_while() -> None:
    run = Run()
    run.live(0.050, 120)
    run.live(0.200, 240)
    assert run.live(0.200, 120) == 64


def test_noise_below_a_quarter_hurts_nobody() -> None:
    run = Run()
    for n in range(400):
        run.live(0.050 * (1.0 + 0.15 * ((n * 7919) % 11 - 5) / 5))
    assert run.concurrency.limit > 48


async def test_the_allowance_lets_in_as_many_as_it_may_in_order() -> None:
    allowance = Allowance(Concurrency(4))
    order: list[int] = []
    may_end = asyncio.Event()

    async def work(n: int) -> None:
        async with allowance:
            order.append(n)
            await may_end.wait()

    tasks = [asyncio.create_task(work(n)) for n in range(9)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (order, allowance.in_flight) == ([0, 1, 2, 3], 4)
    tasks[4].cancel()
    may_end.set()
    await asyncio.wait(tasks)
    assert order == [0, 1, 2, 3, 5, 6, 7, 8]
    assert allowance.in_flight == 0
    await allowance.emptied()


async def test_who_leaves_while_turns_are_given_is_passed_over() -> None:
    allowance = Allowance(Concurrency(1))

    async def work() -> None:
        async with allowance:
            await asyncio.sleep(0)

    async with allowance:
        tasks = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # not woken yet when the turn comes to it
    await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [True, False, False]
    assert allowance.in_flight == 0


async def test_a_turn_that_is_given_to_somebody_who_leaves_goes_on() -> None:
    allowance = Allowance(Concurrency(1))
    entered: list[str] = []

    async def work(name: str) -> None:
        async with allowance:
            entered.append(name)

    async with allowance:
        first, second = asyncio.create_task(work("first")), asyncio.create_task(work("second"))
        await asyncio.sleep(0)
    first.cancel()  # its turn has been given, but it has not woken yet
    await asyncio.wait([first, second])
    assert entered == ["second"]
    assert allowance.in_flight == 0


def test_what_live_traffic_feels_is_read_from_the_segment() -> None:
    segment = Segment.create(2, 4)
    traffic = LiveTraffic(segment)
    assert traffic.look() == Live()
    for shard in range(2):
        row = segment.layout.load(shard, 3, 0)
        segment.cells[row + at.L_PREDICTIONS] += 5
        segment.cells[row + at.L_REAL_US] += 1_000_000
    for slot, waiting in ((1, 3.0), (2, 1.0), (3, None)):
        segment.set_status(slot, at.STATUS_UP)
        segment.report(slot, EngineSignals(time.monotonic(), waiting=waiting))
    assert traffic.look() == Live(10, 2.0, 2.0, is_waiting_new=True)
    assert traffic.look() == Live(0, 0.0, 2.0)
    segment.set_status(1, at.STATUS_DOWN)
    assert traffic.look() == Live(0, 0.0, 1.0)
    segment.report(2, EngineSignals(time.monotonic() - 60, waiting=9.0))
    assert traffic.look() == Live()
