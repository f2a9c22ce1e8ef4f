"""Control's work on the prefix index: capacities, forgetting, eviction in slices that end at once."""

from __future__ import annotations

import asyncio
import time

import pytest

from pointsman.config.settings import Settings
from pointsman.config.snapshot import Shared, Snapshot, WorkerSpec
from pointsman.daemon.control.residency import Residency
from pointsman.daemon.shm.routing_state import GHOST_FACTOR, IndexSize, RoutingState
from pointsman.daemon.shm.segment import EngineSignals, Segment
from tests.fakes.leeway import leeway


def spec(slot: int, kv_tokens: int | None = None) -> WorkerSpec:
    url = f"http://127.0.0.1:{9000 + slot}"
    return WorkerSpec(str(slot), url, slot, "127.0.0.1", "127.0.0.1", 9000 + slot, kv_tokens=kv_tokens)


class Bench:
    def __init__(self, *workers: WorkerSpec, mib: int = 8, **settings: float) -> None:
        self.state = RoutingState.create(Segment.create(1, 8), IndexSize(mib, 64), 10_000)
        self.snapshot = Snapshot(1, workers=workers)
        values = {"max_tree_size": 10_000, "eviction_interval_secs": 120.0} | settings
        options = Settings(runtime_dir="/x", state_dir="/x", **values)  # type: ignore[arg-type]
        self.residency = Residency(self.state, options, lambda: self.snapshot)

    def fill(self, slot: int, chars: int, name: bytes = b"") -> None:
        chain = self.state.index.chain().load(name + bytes(chars - len(name)))
        assert self.state.index.insert(slot, chain) >= 0


def test_a_declared_capacity_wins_over_what_the_engine_tells() -> None:
    bench = Bench(spec(0), spec(1, kv_tokens=50), spec(2))
    for slot in (0, 1):
        bench.state.segment.report(slot, EngineSignals(1.0, kv_tokens=100))
    bench.residency.follow_capacities()
    assert [bench.state.kv_tokens(slot) for slot in range(3)] == [100, 50, 0]
    assert [bench.state.index.capacity(slot) for slot in range(3)] == [400, 200, 0]
    assert bench.state.index.capacity(bench.state.ghost) == GHOST_FACTOR * (400 + 200 + 10_000)


async def test_eviction_brings_everybody_down_and_spares_the_ghost() -> None:
    bench = Bench(spec(0), spec(1, kv_tokens=500))
    bench.residency.follow_capacities()
    bench.fill(0, 30_000)
    bench.fill(1, 1_900)
    bench.fill(bench.state.ghost, 30_000)
    assert await bench.residency.evict(10_000) > 0
    assert 9_000 < bench.state.index.size(0) <= 10_000
    assert bench.state.index.size(1) == 1_900
    assert bench.state.index.size(bench.state.ghost) == 30_000


async def test_the_shared_section_changes_eviction_live() -> None:
    bench = Bench(spec(0), eviction_interval_secs=7.0)
    assert bench.residency.limits() == (7.0, 10_000)
    bench.snapshot = Snapshot(2, workers=(spec(0),), shared=Shared(0.0, 5))
    assert bench.residency.limits() == (0.0, 5)


async def test_a_lowered_capacity_is_reached_without_waiting_for_the_interval() -> None:
    bench = Bench(spec(0))
    bench.fill(0, 9_000)
    bench.state.segment.report(0, EngineSignals(1.0, kv_tokens=100))
    task = asyncio.get_running_loop().create_task(bench.residency.run())
    async with asyncio.timeout(30):
        while bench.state.index.size(0) > 400:  # noqa: ASYNC110 - shared memory tells nobody
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_eviction_ends_at_once_and_leaves_the_index_sound() -> None:
    bench = Bench(spec(0), mib=64)
    for number in range(40):
        bench.fill(0, 400_000, b"%d" % number)
    task = asyncio.get_running_loop().create_task(bench.residency.evict(1_000))
    for _ in range(3):
        await asyncio.sleep(0)
    started = time.thread_time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.thread_time() - started < 0.01 * leeway()
    assert bench.state.index.size(0) > 1_000
    assert bench.state.index.check() == []


async def test_what_is_forgotten_matches_no_more_at_that_worker_alone() -> None:
    bench = Bench(spec(0), spec(1))
    for slot in (0, 1):
        bench.fill(slot, 3_000)
    assert await bench.residency.forget(0) == 3_000
    chain = bench.state.index.chain().load(bytes(3_000))
    bench.state.index.match(chain, bench.state.matched)
    assert (bench.state.matched[0], bench.state.matched[1]) == (0, 3_000)
