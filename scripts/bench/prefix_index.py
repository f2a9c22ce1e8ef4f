#!/usr/bin/env python3
"""What the prefix index costs: CPU of the calling thread per prompt (median) and wall time (p99).

    .venv/bin/python scripts/bench/prefix_index.py [--size-mib 64] [--rounds 2000] [--json FILE] [--check]

Every sample is a prompt whose first half the workers share and whose second half is new: hash it, match it for all
workers, insert it for one. *shared*: all workers hold the whole first half. *staggered*: every worker holds another
part of it, the worst case of the walk. *full*: the pools are full, every insert evicts. The text is assembled just
before the sample, as a request body has just been received. The cost of the clock (0.5 us) is measured and subtracted.
`--check` exits 1 above the bounds of BOUNDS. `--processes N` instead lets N processes hammer one index with 32 KB
prompts and shows what the one mutex costs them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from pathlib import Path
from statistics import median

from pointsman.daemon.shm.prefix_index import HashChain, PrefixIndex

KIB = 1024
BOUNDS = {"match + insert, 32 KB, 64 workers": 10.0, "lock hold, 128 KB, 64 workers": 20.0}
"""Microseconds, medians, at every fill and sharing."""


@dataclass(frozen=True, slots=True)
class Row:
    prompt_kib: int
    workers: int
    sharing: str
    fill: str
    median_us: float
    p99_wall_us: float
    hash_us: float
    hold_us: float
    hold_p99_wall_us: float


class Bench:
    """One index in one state; every sample is another prompt."""

    def __init__(self, size_mib: float, workers: int, prompt_bytes: int, *, is_staggered: bool, is_full: bool) -> None:
        self.rng = random.Random(7)
        self.workers = workers
        self.index = PrefixIndex.create(size_mib, workers, seed=1)
        self.index.populate()
        self.chain = self.index.chain()
        self.out = array("Q", bytes(8 * workers))
        self.pool = self.rng.randbytes(1 << 22)
        self.shared = self.rng.randbytes(prompt_bytes // 2)
        self.suffix_bytes = prompt_bytes - len(self.shared)
        self.serial = 0
        if is_full:
            while not self.index.totals()["memory_evictions"]:
                self.index.insert(self.rng.randrange(workers), self.chain.load(self._new(128 * KIB)))
        self.is_full, self.is_staggered = is_full, is_staggered
        self.share()

    def empty(self) -> None:
        for slot in range(self.workers):
            while self.index.evict(slot, 0):
                pass
        self.share()

    def share(self) -> None:
        for slot in range(self.workers):
            part = (slot + 1) * len(self.shared) // self.workers if self.is_staggered else len(self.shared)
            self.index.insert(slot, self.chain.load(self.shared[:part]))

    def _new(self, size: int) -> bytes:
        """Text that no sample had before, without drawing all of it."""
        self.serial += 1
        at = self.rng.randrange(len(self.pool) - size)
        return b"%016d" % self.serial + self.pool[at + 16 : at + size]

    def prompt(self) -> bytes:
        if not self.is_full and self.serial % 500 == 499:
            self.empty()
        return self.shared + self._new(self.suffix_bytes)

    def slot(self) -> int:
        return self.workers - 1 if self.is_staggered else self.rng.randrange(self.workers)


def measure(rounds: int, prepare: Callable[[], object], work: Callable[[], object]) -> tuple[float, float]:
    """Median of thread CPU and p99 of wall time, in microseconds."""
    cpu, wall = [], []
    for _ in range(rounds):
        prepare()
        wall_start, start = time.perf_counter_ns(), time.thread_time_ns()
        work()
        cpu.append(time.thread_time_ns() - start)
        wall.append(time.perf_counter_ns() - wall_start)
    wall.sort()
    return median(cpu) / 1000, wall[len(wall) * 99 // 100] / 1000


def bench(size_mib: float, workers: int, prompt_kib: int, sharing: str, fill: str, rounds: int) -> Row:
    state = Bench(size_mib, workers, prompt_kib * KIB, is_staggered=sharing == "staggered", is_full=fill == "full")
    index, chain, out = state.index, state.chain, state.out
    text, slot = b"", 0

    def prepare() -> None:
        nonlocal text, slot
        text, slot = state.prompt(), state.slot()

    def load() -> HashChain:
        return chain.load(text, "model")

    def whole() -> None:
        index.match_and_insert(chain.load(text), slot, out)

    def held() -> None:
        index.match(chain, out)
        index.insert(slot, chain)

    def prepare_held() -> None:
        index.unlock()
        prepare()
        chain.load(text)
        index.lock()

    clock_us = measure(rounds, lambda: None, lambda: None)[0]
    hash_us = measure(rounds, prepare, load)[0]
    whole_us, whole_p99 = measure(rounds, prepare, whole)
    index.lock()
    hold_us, hold_p99 = measure(rounds, prepare_held, held)
    index.unlock()
    problems = index.check()
    if problems:
        sys.exit("\n".join(problems))
    return Row(
        prompt_kib,
        workers,
        sharing,
        fill,
        median_us=round(whole_us - clock_us, 2),
        p99_wall_us=round(whole_p99, 1),
        hash_us=round(hash_us - clock_us, 2),
        hold_us=round(hold_us - clock_us, 2),
        hold_p99_wall_us=round(hold_p99, 1),
    )


def hammer(index: PrefixIndex, name: int, seconds: float) -> tuple[int, float, float, int]:
    """Prompts done; median and p99 wall time of match + insert without hashing; how often the lock was not got."""
    mine = PrefixIndex.attach(index.fd)
    chain, out, rng = mine.chain(), array("Q", bytes(8 * 64)), random.Random(name)
    shared, pool = random.Random(0).randbytes(16 * KIB), rng.randbytes(1 << 22)
    waits, missed, until = [], 0, time.monotonic() + seconds
    while time.monotonic() < until:
        at = rng.randrange(len(pool) - 16 * KIB)
        chain.load(shared + pool[at : at + 16 * KIB])
        start = time.perf_counter_ns()
        missed += mine.match_and_insert(chain, rng.randrange(64), out) < 0
        waits.append(time.perf_counter_ns() - start)
    waits.sort()
    return len(waits), median(waits) / 1000, waits[len(waits) * 99 // 100] / 1000, missed


def contend(size_mib: float, processes: int, seconds: float = 3) -> None:
    index = PrefixIndex.create(size_mib, 64, seed=1)
    index.populate()
    results, lengths = Pipe(duplex=False)
    for name in range(processes):
        if os.fork() == 0:
            try:
                lengths.send(hammer(index, name, seconds))
            finally:
                os._exit(0)
    print("process  prompts/s  wall median  p99 (us)  lock not got")
    for name in range(processes):
        count, middle, p99, missed = results.recv()
        print(f"{name:7}  {count / seconds:9.0f}  {middle:11.1f}  {p99:8.1f}  {missed:12}")
    for _ in range(processes):
        os.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    if arguments.processes:
        contend(arguments.size_mib, arguments.processes)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    print("KiB  workers  sharing    fill    match+insert  p99 wall    hashing  lock hold  p99 wall   (us; CPU medians)")
    rows = []
    for prompt_kib in (1, 32, 128):
        for sharing in ("shared", "staggered"):
            for workers in (4, 16, 64, 256):
                for fill in ("empty", "full"):
                    row = bench(arguments.size_mib, workers, prompt_kib, sharing, fill, arguments.rounds)
                    rows.append(row)
                    print(
                        f"{prompt_kib:3}  {workers:7}  {sharing:9}  {fill:6}",
                        f"{row.median_us:12.2f}  {row.p99_wall_us:8.1f}",
                        f"{row.hash_us:9.2f}  {row.hold_us:9.2f}  {row.hold_p99_wall_us:8.1f}",
                        sep="  ",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    missed = find_misses(rows)
    print("\n".join(missed) or "within the bounds")
    sys.exit(bool(missed and arguments.check))


def find_misses(rows: list[Row]) -> list[str]:
    missed = []
    for row in rows:
        if row.workers == 64 and row.prompt_kib == 32 and row.median_us > BOUNDS["match + insert, 32 KB, 64 workers"]:
            missed.append(f"match + insert of 32 KB, {row.sharing}, {row.fill}: {row.median_us} us")
        if row.workers == 64 and row.prompt_kib == 128 and row.hold_us > BOUNDS["lock hold, 128 KB, 64 workers"]:
            missed.append(f"lock hold at 128 KB, {row.sharing}, {row.fill}: {row.hold_us} us")
    return missed


if __name__ == "__main__":
    main()
