"""What control does for the prefix index: capacities as engines tell them, caches that are gone, eviction in slices.

All work is done in slices of at most a millisecond with the event loop in between, and ends at once when its task is
cancelled: what was begun to be forgotten is finished by the next eviction.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator

from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.logs import log

TURN_S = 1.0


class Residency:
    """`current`: the configuration in force, whose `shared` section may change the settings of eviction live."""

    def __init__(self, state: RoutingState, settings: Settings, current: Callable[[], Snapshot]) -> None:
        self._state = state
        self._settings = settings
        self._current = current
        self._last_eviction = time.monotonic()
        self._has_shrunk = False
        """a capacity was lowered: evict without waiting for the interval"""
        self.forgotten: Counter[int] = Counter()
        """times that a slot's cache was found to be gone"""

    async def run(self) -> None:
        """For good: follow the capacities, evict when it is due."""
        while True:
            self.follow_capacities()
            now = time.monotonic()
            interval, max_tree_size = self.limits()
            if self._has_shrunk or (interval and now - self._last_eviction >= interval):
                self._has_shrunk, self._last_eviction = False, now
                await self.evict(max_tree_size)
            await asyncio.sleep(TURN_S)

    def limits(self) -> tuple[float, int]:
        """(seconds between evictions, 0 = never; characters per worker of unknown capacity)"""
        current, settings = self._current(), self._settings
        interval, size = current.shared.eviction_interval_secs, current.shared.max_tree_size
        return (
            settings.eviction_interval_secs if interval is None else interval,
            settings.max_tree_size if size is None else size,
        )

    def follow_capacities(self) -> None:
        """What is declared counts, else what the engine told last."""
        state = self._state
        workers = self._current().workers
        for worker in workers:
            tokens = worker.kv_tokens or state.segment.kv_tokens(worker.slot)
            before = state.kv_tokens(worker.slot)
            if tokens != before:
                state.set_kv_tokens(worker.slot, tokens)
                self._has_shrunk = True
                log("kv_capacity", worker=worker.url, tokens=tokens or None)
        state.fit_ghost(self.limits()[1], tuple(worker.slot for worker in workers))

    async def forget(self, slot: int) -> int:
        """The cache of the worker at `slot` is gone. Nothing of it is matched from now on; returns the characters."""
        held = self._state.index.size(slot)
        self.forgotten[slot] += 1
        await _in_slices(self._state.index.forget(slot))
        return held

    async def evict(self, max_tree_size: int) -> int:
        """Returns the blocks dropped."""
        started = time.monotonic()
        dropped = await _in_slices(self._state.index.evict_to(max_tree_size, unless_known=True))
        if dropped:
            log("prefixes_evicted", blocks=dropped, seconds=round(time.monotonic() - started, 3))
        return dropped


async def _in_slices(work: Iterator[int | None]) -> int:
    done = 0
    for dropped in work:
        done += dropped or 0
        await asyncio.sleep(0)
    return done
