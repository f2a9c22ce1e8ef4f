#!/usr/bin/env python3
"""What the choice of a worker costs a request: CPU of the calling thread, medians, in microseconds.

    scripts/check-choosing [--rounds 4000] [--json FILE] [--check]

Every sample is a chat request whose first half is known to the fleet and whose second half is new. *scan*: model, flags
and prompt found in the body. *choose*: the prompt hashed, matched, every worker scored, one picked, booked, and the
prompt inserted and pinned in the index. *end*: first token and finish. 32 requests are in flight all the time. With
several *processes* each is a shard that does the same on the same shared state, as fast as it can; the figure is
that of the slowest. *full*: the pools of the index are full, every insert evicts; else they never get full. The cost
of the clock is measured and subtracted. `--check` exits 1 above the bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from multiprocessing import Barrier, Pipe
from multiprocessing.connection import Connection as Sender
from multiprocessing.synchronize import Barrier as AnyBarrier
from pathlib import Path
from statistics import median

from pointsman.config.snapshot import Snapshot, WorkerSpec
from pointsman.daemon.dispatch.router import LiveRouter
from pointsman.daemon.routing.request import json_features
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import Booked
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment

KIB = 1024
INDEX_MIB = 256
MAX_TREE_SIZE = 2**26
IN_FLIGHT = 32
OUTPUT_TOKENS = 100
MOST_WORKERS = 255
"""that an index has room for"""
MOST_US = 12.0
"""of a choice with 32 KB, 64 workers, 4 processes"""
MOST_GROWTH = MOST_WORKERS / 4
"""from 4 to {MOST_WORKERS} workers: not more than the workers"""
MOST_WHEN_FULL = 2.0
"""times what it costs with an empty index"""
BODY = (
    b'{"model": "meta-llama/Llama-3.1-8B-Instruct", "messages": [{"role": "system", "content": "%b"}, '
    b'{"role": "user", "content": "%b"}], "max_tokens": 128, "stream": true, "temperature": 0.7}'
)


@dataclass(frozen=True, slots=True)
class Case:
    prompt_kib: int
    workers: int
    processes: int = 1
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    scan_us: float
    choose_us: float
    end_us: float


CASES = [
    *(Case(1, workers) for workers in (4, 16, 64, MOST_WORKERS)),
    *(Case(32, workers) for workers in (4, 16, 64, MOST_WORKERS)),
    Case(128, 64),
    *(Case(kib, 64, is_full=True) for kib in (1, 32)),
    *(Case(kib, 64, processes) for kib in (1, 32) for processes in (2, 4)),
    Case(32, 64, 4, is_full=True),
]


class Fleet:
    """Shared state of `case.processes` shards and a table of `case.workers` workers."""

    def __init__(self, case: Case) -> None:
        self.case = case
        workers = tuple(_worker(slot) for slot in range(case.workers))
        self.table = RoutingTable(Snapshot(1, workers=workers))
        segment = Segment.create(case.processes, case.workers)
        self.state = RoutingState.create(segment, IndexSize(INDEX_MIB, 512), MAX_TREE_SIZE)
        self.state.index.populate()
        for worker in workers:
            segment.set_status(worker.slot, at.STATUS_UP)
        self.known = _text(random.Random(7), case.prompt_kib * KIB // 2)
        if case.is_full:
            self._fill()

    def _fill(self) -> None:
        index, rng = self.state.index, random.Random(8)
        chain = index.chain()
        while not index.totals()["memory_evictions"]:
            index.insert(rng.randrange(self.case.workers), chain.load(rng.randbytes(128 * KIB)))


def _worker(slot: int) -> WorkerSpec:
    url = f"http://10.0.{slot >> 8}.{slot & 255}:8000"
    return WorkerSpec(id=f"w{slot}", url=url, slot=slot, address=url[7:-5], host=url[7:-5], port=8000)


def _text(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(size // 2).hex().encode()


def measure(fleet: Fleet, shard: int, rounds: int) -> Figures:
    """What `rounds` requests of one shard cost, a quarter more for warming up."""
    rng, clock = random.Random(shard), time.thread_time_ns
    router, table = LiveRouter(fleet.state, shard, rng), fleet.table
    pool, plan = table.everyone, table.early_plan(None)
    size = len(fleet.known)
    supply = _text(rng, 1 << 22)
    running: deque[Booked] = deque()
    scans: list[int] = []
    choices: list[int] = []
    ends: list[int] = []
    clock_ns = median(-(clock() - clock()) for _ in range(1001))
    for _ in range(rounds + rounds // 4):
        first = rng.randrange(len(supply) - size)
        body = BODY % (fleet.known, b"%016d" % rng.getrandbits(50) + supply[first + 16 : first + size])
        now = time.monotonic()
        before = clock()
        features = json_features(body)
        scanned = clock()
        tokens = router.read_prompt(features)
        booked = router.choose_least_cost(features, len(body), pool, plan, tokens, now)
        choices.append(clock() - scanned)
        scans.append(scanned - before)
        running.append(booked)
        if len(running) > IN_FLIGHT:
            ends.append(_end(router, running.popleft(), now))
    while running:
        _end(router, running.popleft(), time.monotonic())
    return Figures(*((median(taken[-rounds:]) - clock_ns) / 1000 for taken in (scans, choices, ends)))


def _end(router: LiveRouter, booked: Booked, now: float) -> int:
    start = time.thread_time_ns()
    router.first_token(booked, now)
    router.finish(booked, now, OUTPUT_TOKENS)
    return time.thread_time_ns() - start


def run(case: Case, rounds: int) -> Figures:
    """The slowest of all shards. Raises SystemExit when the index is not in order afterwards."""
    fleet, start = Fleet(case), Barrier(case.processes)
    results, sender = Pipe(duplex=False)
    children = [_fork(fleet, shard, rounds, start, sender) for shard in range(1, case.processes)]
    start.wait()
    figures = [measure(fleet, 0, rounds)]
    figures += [results.recv() for _ in children]
    for child in children:
        os.waitpid(child, 0)
    problems = fleet.state.index.check()
    if problems:
        sys.exit("\n".join(problems))
    return max(figures, key=lambda one: one.choose_us)


def _fork(fleet: Fleet, shard: int, rounds: int, start: AnyBarrier, sender: Sender) -> int:
    child = os.fork()
    if child == 0:
        try:
            start.wait()
            sender.send(measure(fleet, shard, rounds))
        finally:
            os._exit(0)
    return child


def find_misses(figures: dict[Case, Figures]) -> list[str]:
    missed = []
    contended = figures[Case(32, 64, 4)].choose_us
    if contended > MOST_US:
        missed.append(f"32 KB, 64 workers, 4 processes: {contended:.1f} us, more than {MOST_US:g}")
    for kib in (1, 32):
        growth = figures[Case(kib, MOST_WORKERS)].choose_us / figures[Case(kib, 4)].choose_us
        if growth > MOST_GROWTH:
            missed.append(f"{kib} KB, from 4 to {MOST_WORKERS} workers: {growth:.1f} times, more than {MOST_GROWTH:g}")
        filled = figures[Case(kib, 64, is_full=True)].choose_us / figures[Case(kib, 64)].choose_us
        if filled >= MOST_WHEN_FULL:
            missed.append(f"{kib} KB, from an empty to a full index: {filled:.2f} times, not below {MOST_WHEN_FULL:g}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000, help="requests per process and case (4000)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    print("KiB  workers  processes  index     scan  choose     end   (us)")
    figures: dict[Case, Figures] = {}
    for case in CASES:
        found = figures[case] = run(case, arguments.rounds)
        print(
            f"{case.prompt_kib:3}  {case.workers:7}  {case.processes:9}  {'full' if case.is_full else 'empty':5}",
            f"{found.scan_us:7.2f} {found.choose_us:7.2f} {found.end_us:7.2f}",
            flush=True,
        )
    if arguments.json:
        rows = [asdict(case) | asdict(found) for case, found in figures.items()]
        arguments.json.write_text(json.dumps(rows, indent=1))
    missed = find_misses(figures)
    print("\n".join(missed) or "within the bounds")
    sys.exit(bool(missed and arguments.check))


if __name__ == "__main__":
    main()
