"""All that picks go by and bookings change, as one process sees it: segment, booking table, recent keys, prefix index.

Everything but the index lies in the segment and is guarded by the routing mutex; the index is a segment of its own with
its own mutex. Who needs both takes the routing mutex first. A process that finds the routing mutex taken from a dead
holder has the booking table computed anew before it reads it (`locked`, `lock`).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.bookings import Bookings
from pointsman.daemon.shm.prefix_index import PrefixIndex
from pointsman.daemon.shm.recent import RecentKeys
from pointsman.daemon.shm.segment import Segment

CHARS_PER_TOKEN = 4
RECLAIM_DEADLINE_US = 50_000
GHOST_FACTOR = 4
"""Blocks that this many fleets could hold are remembered, to see what a larger cache would have hit."""


@dataclass(frozen=True, slots=True)
class IndexSize:
    mib: float
    block_bytes: int


class RoutingState:
    """`matched` and `pinned`: characters by worker slot after `index.match(chain, matched)`; the last is the ghost."""

    def __init__(self, segment: Segment, index: PrefixIndex) -> None:
        layout = segment.layout
        memory, first = segment.memory, layout.bookings * at.WORD
        self.segment = segment
        self.words = segment.words
        self.index = index
        self.bookings = Bookings(memory, layout.shards, layout.slots, at.BOOKINGS_PER_SHARD, first)
        self.sessions = RecentKeys(memory, layout.sessions * at.WORD, at.SESSIONS)
        self.users = RecentKeys(memory, layout.users * at.WORD, at.USERS)
        self.key = index.totals()["seed"].to_bytes(8, "little")
        """for other hashes than the index' own"""
        self.ghost = layout.slots
        """the index slot of no worker: what was seen lately at all"""
        self.matched = array("Q", bytes(8 * (layout.slots + 1)))
        self.pinned = array("Q", bytes(8 * (layout.slots + 1)))
        self.bookings.lend(self.matched, self.pinned)

    @classmethod
    def create(cls, segment: Segment, size: IndexSize, max_tree_size: int, seed: int | None = None) -> RoutingState:
        """Only by the supervisor. `seed`: of the hashes, drawn unless given. Raises ValueError for sizes that make no
        index."""
        index = PrefixIndex.create(size.mib, segment.layout.slots + 1, block_bytes=size.block_bytes, seed=seed)
        state = cls(segment, index)
        state.bookings.create()
        state.fit_ghost(max_tree_size)
        return state

    @classmethod
    def attach(cls, segment: Segment, index_fd: int) -> RoutingState:
        """Raises PrefixIndexError when the descriptor is no index of this version."""
        return cls(segment, PrefixIndex.attach(index_fd))

    # --- the routing mutex

    def lock(self, deadline_us: int = 2000) -> bool:
        """True when held, with the booking table in order; False: decide by the lock-free counters."""
        if not self.words.lock(deadline_us):
            return False
        self.bookings.recover(self.segment.lock_recoveries, time.monotonic())
        return True

    @contextmanager
    def locked(self, deadline_us: int = RECLAIM_DEADLINE_US) -> Iterator[bool]:
        """Yields whether the mutex is held."""
        held = self.lock(deadline_us)
        try:
            yield held
        finally:
            if held:
                self.words.unlock()

    # --- workers and shards that go

    def reclaim_shard(self, shard: int) -> bool:
        """End what a dead shard had booked and pinned. False: a mutex is not to be had now, try again."""
        with self.locked() as held:
            if not held:
                return False
            self.bookings.reclaim(shard, time.monotonic())
        return self.index.reclaim_shard(shard) >= 0

    def forget_cache(self, slot: int) -> None:
        """A worker's cache is gone (restarted, flushed, new weights): nothing of it is matched from now on."""
        self.index.remove_worker(slot)

    def clear_worker(self, slot: int) -> bool:
        """Empty a slot for its next tenant; nothing may be in flight on it. False: try again."""
        with self.locked() as held:
            if not held:
                return False
            self.bookings.forget_worker(slot)
            self.sessions.forget_number(slot)
            self.words.fill_zero(self.segment.layout.breaker(slot), at.BREAKER_WORDS)
            self.count_breakers()
        self.index.put_capacity(slot, 0)
        self.index.remove_worker(slot)
        return True

    def oldest_starts(self) -> array[float]:
        """By worker slot when its oldest booked request began (seconds of the monotonic clock), inf = there is none.

        A shard whose bookings cannot be read in time is left out. The mutex is held for one shard at a time.
        """
        starts = array("d", [inf]) * self.segment.layout.slots
        for shard in range(self.segment.layout.shards):
            with self.locked() as held:
                if held:
                    self.bookings.note_oldest(shard, starts)
        return starts

    def count_breakers(self) -> None:
        """How many are not closed, for those who ask before every pick. The routing mutex is held."""
        layout, cells = self.segment.layout, self.segment.cells
        cells[at.H_BREAKERS] = sum(cells[layout.breaker(slot)] != 0 for slot in range(layout.slots))

    # --- capacities

    def set_kv_tokens(self, slot: int, tokens: int) -> None:
        """What an engine's KV cache holds; 0 = not known. In force for the next pick; eviction has to follow."""
        self.bookings.set_kv_chars(slot, tokens * CHARS_PER_TOKEN)
        self.index.put_capacity(slot, tokens * CHARS_PER_TOKEN)

    def kv_tokens(self, slot: int) -> int:
        """As picks go by it; 0 = not known."""
        return self.bookings.kv_chars(slot) // CHARS_PER_TOKEN

    def fit_ghost(self, max_tree_size: int, slots: tuple[int, ...] = ()) -> None:
        """The ghost remembers as much as GHOST_FACTOR fleets hold; `slots` are the fleet's."""
        held = sum(self.bookings.kv_chars(slot) or max_tree_size for slot in slots)
        self.index.put_capacity(self.ghost, GHOST_FACTOR * (held or max_tree_size))
