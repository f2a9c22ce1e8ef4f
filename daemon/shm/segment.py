"""The shared segment as the rest of the daemon uses it: rows by name instead of offsets.

Created once by the supervisor as a memfd (a name in /dev/shm would be deleted behind our back, or left behind), the
descriptor inherited by every child. Anybody may die at any instruction: no word is ever in a state that a reader
could not use.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.failure_counts import FailureCounts
from pointsman.daemon.shm.native import Words


class SegmentError(PointsmanError):
    """The descriptor is not a segment of this version."""


@dataclass(frozen=True, slots=True)
class EngineSignals:
    """What an engine reported at `at_s` (seconds of the monotonic clock); None = it does not tell. Shares are 0..1."""

    at_s: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    cpu_kv_usage: float | None = None
    busy: float | None = None
    utilization: float | None = None
    prompt_tokens: float | None = None
    """Prompt tokens that it looked up in its prefix cache since its start."""
    cached_tokens: float | None = None
    """Those of them that it found."""
    kv_tokens: int | None = None
    """Tokens that its KV cache holds."""


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
        self.memory = memory
        self.words = Words(memory, layout.shards, layout.slots, layout.loads, layout.workers)
        self.cells = memoryview(memory).cast("q")
        """Plain words, for the owner of a row to count in and for readers of what needs no lock."""
        self.reals = memoryview(memory).cast("d")
        """The same words, read as doubles."""
        self.bytes = memoryview(memory)

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
            (at.H_INTERNAL_TOKEN, secrets.randbits(63)),
            (at.H_INTERNAL_TOKEN + 1, secrets.randbits(63)),
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
    def lock_waits(self) -> int:
        return self.words.get(at.H_LOCK_WAITS)

    @property
    def lock_recoveries(self) -> int:
        return self.words.get(at.H_LOCK_RECOVERIES)

    @property
    def internal_token(self) -> bytes:
        """What a request of this daemon's own shows; readable for whoever has the segment, and nobody else."""
        return b"%016x%016x" % (self.cells[at.H_INTERNAL_TOKEN], self.cells[at.H_INTERNAL_TOKEN + 1])

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

    def close_at_s(self, slot: int) -> float | None:
        """When shards end what runs at the worker, in seconds of the monotonic clock; None: they do not."""
        close_at_ms = self.words.get(self.layout.worker(slot, at.W_CLOSE_AT_MS))
        return close_at_ms / 1000 if close_at_ms else None

    def set_close_at(self, slot: int, moment_s: float | None) -> None:
        """Only for a worker that drains. Shards look several times a second; no other process is needed for it."""
        close_at_ms = 0 if moment_s is None else max(int(moment_s * 1000), 1)
        self.words.put(self.layout.worker(slot, at.W_CLOSE_AT_MS), close_at_ms)

    def inflight(self, slot: int) -> int:
        return self.words.total(slot, at.L_INFLIGHT)

    def holds(self, slot: int) -> int:
        """Requests whose KV decode has yet to fetch from this prefill worker."""
        return self.words.total(slot, at.L_HOLDS)

    def is_empty(self, slot: int) -> bool:
        """Nobody needs the worker any more."""
        return self.inflight(slot) == 0 and self.holds(slot) == 0

    def total(self, slot: int, word: int) -> int:
        return self.words.total(slot, word)

    def clear_worker(self, slot: int) -> None:
        """Empty a slot for its next tenant; only when it is in no generation and nothing is in flight on it."""
        for shard in range(self.layout.shards):
            self.words.fill_zero(self.layout.load(shard, slot, 0), at.LOAD_WORDS)
        self.words.fill_zero(self.layout.signal(slot, 0), at.SIGNAL_WORDS)
        self.words.fill_zero(self.layout.worker(slot, 0), at.WORKER_WORDS)

    # --- what engines report

    def report(self, slot: int, report: EngineSignals) -> None:
        """What a worker's engine says of itself now. Only by control."""
        first = self.layout.signal(slot, 0)
        for word, value in (
            (at.S_RUNNING, report.running),
            (at.S_WAITING, report.waiting),
            (at.S_KV_USAGE, report.kv_usage),
            (at.S_CPU_KV_USAGE, report.cpu_kv_usage),
            (at.S_BUSY, report.busy),
            (at.S_UTILIZATION, report.utilization),
            (at.S_PROMPT_TOKENS, report.prompt_tokens),
            (at.S_CACHED_TOKENS, report.cached_tokens),
        ):
            self.reals[first + word] = math.nan if value is None else value
        if report.kv_tokens is not None:
            self.cells[first + at.S_KV_TOKENS] = report.kv_tokens
        self.reals[first + at.S_AT_S] = report.at_s

    def signals(self, slot: int) -> EngineSignals | None:
        """The last report, however old; None when there was none."""
        first = self.layout.signal(slot, 0)
        at_s = self.reals[first + at.S_AT_S]
        if not at_s:
            return None
        told = {
            name: None if math.isnan(value := self.reals[first + word]) else value
            for name, word in (
                ("running", at.S_RUNNING),
                ("waiting", at.S_WAITING),
                ("kv_usage", at.S_KV_USAGE),
                ("cpu_kv_usage", at.S_CPU_KV_USAGE),
                ("busy", at.S_BUSY),
                ("utilization", at.S_UTILIZATION),
                ("prompt_tokens", at.S_PROMPT_TOKENS),
                ("cached_tokens", at.S_CACHED_TOKENS),
            )
        }
        return EngineSignals(at_s, kv_tokens=self.kv_tokens(slot) or None, **told)

    def kv_tokens(self, slot: int) -> int:
        """The worker's KV capacity; 0 = not known."""
        return self.cells[self.layout.signal(slot, at.S_KV_TOKENS)]

    # --- batches

    def batch_count(self, word: int) -> int:
        """One of `layout.B_*`."""
        return self.cells[self.layout.batch_counts + word]

    def store_failures(self) -> FailureCounts:
        first = self.layout.batch_counts + at.B_FAILURES
        return FailureCounts(self.cells[first : first + at.FAILURE_ROWS * at.FAILURE_WORDS])

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
            self.words.put(row + at.L_HOLDS, 0)
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
