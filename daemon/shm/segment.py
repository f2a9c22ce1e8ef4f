"""The shared segment as the rest of the daemon uses it: rows by name instead of offsets.

Created once by the supervisor as a memfd (a name in /dev/shm would be deleted behind our back, or left behind), the
descriptor inherited by every child. Anybody may die at any instruction: no word is ever in a state that a reader
could not use.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.native import Words


class SegmentError(PointsmanError):
    """The descriptor is not a segment of this version."""


@dataclass(frozen=True, slots=True)
class ProcessRow:
    pid: int
    state: int
    restarts: int
    started_ns: int
    heartbeat_ns: int
    loaded_generation: int


class Segment:
    """One process' view of the segment. Not for threads: every process of ours has one."""

    def __init__(self, fd: int, layout: at.Layout, memory: mmap.mmap) -> None:
        self.fd = fd
        self.layout = layout
        self.words = Words(memory, layout.shards, layout.slots, layout.loads, layout.workers)
        self.cells = memoryview(memory).cast("q")
        """Plain words, for the owner of a row to count in and for readers of what needs no lock."""

    @classmethod
    def create(cls, shards: int, slots: int) -> Segment:
        layout = at.Layout(shards, slots)
        fd = os.memfd_create("pointsman-segment", os.MFD_CLOEXEC)
        os.ftruncate(fd, layout.size_bytes)
        segment = cls(fd, layout, mmap.mmap(fd, layout.size_bytes))
        segment.words.init_mutex()
        for word, value in (
            (at.H_VERSION, at.VERSION),
            (at.H_SIZE, layout.size_bytes),
            (at.H_SHARDS, shards),
            (at.H_SLOTS, slots),
            (at.H_CREATED_NS, time.time_ns()),
            (at.H_MAGIC, at.MAGIC),
        ):
            segment.words.put(word, value)
        return segment

    @classmethod
    def attach(cls, fd: int) -> Segment:
        """Raises SegmentError when `fd` is not a segment of this version."""
        size = os.fstat(fd).st_size
        if size < at.PAGE_WORDS * at.WORD:
            raise SegmentError("the shared segment is too small to be one of ours")
        memory = mmap.mmap(fd, size)
        head = memoryview(memory).cast("q")
        identity = (head[at.H_MAGIC], head[at.H_VERSION], head[at.H_SIZE])
        layout = at.Layout(head[at.H_SHARDS], head[at.H_SLOTS])
        head.release()
        if identity != (at.MAGIC, at.VERSION, size) or layout.size_bytes != size:
            raise SegmentError(f"the shared segment is of another version: {identity}")
        return cls(fd, layout, memory)

    # --- header

    @property
    def generation(self) -> int:
        return self.words.generation()

    def make_current(self, generation: int) -> None:
        """The one store that switches all shards; only by the supervisor, after every shard has loaded it."""
        self.words.put(at.H_GENERATION, generation)

    @property
    def is_draining(self) -> bool:
        return self.cells[at.H_PHASE] != at.PHASE_RUNNING

    def start_draining(self) -> None:
        self.words.put(at.H_PHASE, at.PHASE_DRAINING)

    @property
    def lock_timeouts(self) -> int:
        return self.words.get(at.H_LOCK_TIMEOUTS)

    @property
    def lock_recoveries(self) -> int:
        return self.words.get(at.H_LOCK_RECOVERIES)

    # --- processes

    def process(self, index: int) -> ProcessRow:
        start = self.layout.process(index, 0)
        row = self.cells[start : start + at.PROCESS_WORDS]
        return ProcessRow(
            row[at.P_PID],
            row[at.P_STATE],
            row[at.P_RESTARTS],
            row[at.P_STARTED_NS],
            row[at.P_HEARTBEAT_NS],
            row[at.P_LOADED],
        )

    def set_process(self, index: int, word: int, value: int) -> None:
        self.words.put(self.layout.process(index, word), value)

    def beat(self, index: int) -> None:
        self.words.put(self.layout.process(index, at.P_HEARTBEAT_NS), time.monotonic_ns())

    # --- workers

    def status(self, slot: int) -> int:
        return self.words.get(self.layout.worker(slot, at.W_STATUS))

    def set_status(self, slot: int, status: int, *, expected: int | None = None) -> bool:
        """Write a worker's status between two picks: once this returns, no pick on any shard sees the old one.

        With `expected`, only from that status; says whether it was written. A lock that stays taken past its
        deadline belongs to a stopped process: the word is written all the same, a single store needs no repair.
        """
        index = self.layout.worker(slot, at.W_STATUS)
        held = self.words.lock(50_000)
        try:
            current = self.words.get(index)
            if expected is not None and current != expected:
                return False
            if current != status:
                self.words.put(index, status)
                self.words.put(self.layout.worker(slot, at.W_SINCE_MS), time.time_ns() // 1_000_000)
            return True
        finally:
            if held:
                self.words.unlock()

    def status_since_ms(self, slot: int) -> int:
        return self.words.get(self.layout.worker(slot, at.W_SINCE_MS))

    def inflight(self, slot: int) -> int:
        return self.words.total(slot, at.L_INFLIGHT)

    def total(self, slot: int, word: int) -> int:
        return self.words.total(slot, word)

    def clear_worker(self, slot: int) -> None:
        """Empty a slot for its next tenant; only when it is in no generation and nothing is in flight on it."""
        for shard in range(self.layout.shards):
            self.words.fill_zero(self.layout.load(shard, slot, 0), at.LOAD_WORDS)
        self.words.fill_zero(self.layout.worker(slot, 0), at.WORKER_WORDS)

    # --- shards

    def gauge(self, shard: int, word: int) -> int:
        return self.cells[self.layout.gauge(shard, word)]

    def gauge_total(self, word: int) -> int:
        return self.words.column(self.layout.gauge(0, word), at.GAUGE_WORDS, self.layout.shards)

    def reclaim_shard(self, shard: int) -> int:
        """Give back all that a dead shard held; returns how many requests were in flight on it.

        Only by the supervisor, after it has reaped the process: a second writer of the row would lose updates.
        """
        lost = 0
        for slot in range(self.layout.slots):
            row = self.layout.load(shard, slot, 0)
            lost += self.cells[row + at.L_INFLIGHT]
            self.words.put(row + at.L_INFLIGHT, 0)
            self.words.put(row + at.L_INFLIGHT_BYTES, 0)
        self.words.fill_zero(self.layout.gauge(shard, 0), at.G_FIRST_COUNTER)
        return lost

    @contextmanager
    def routing_lock(self) -> Iterator[bool]:
        """Yields whether the lock is held (False after the 2 ms deadline)."""
        held = self.words.lock()
        try:
            yield held
        finally:
            if held:
                self.words.unlock()
