#!/usr/bin/env python3
"""What saving the learned state costs, and what it costs others: CPU, bytes, and how long they wait for the index.

    .venv/bin/python scripts/bench/saved_state.py [--size-mib 256] [--prompt-bytes 16384] [--seconds 5]

Fills an index, each prompt at one of 8 workers and with the ghost, as the router does; saves it, and loads a fresh one
from the file. Then a process like a shard matches and inserts 32 KB prompts all the time, first alone, then while
another one saves again and again: shown is how long it waited for the mutex.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from array import array
from collections.abc import Iterator
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path

from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon.control.residency import Residency
from pointsman.daemon.control.saving import StateSaver
from pointsman.daemon.shm.prefix_dump import IndexLoad
from pointsman.daemon.shm.prefix_index import PrefixIndex
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.workers import saved_state
from pointsman.daemon.workers.registry import Registry
from pointsman.daemon.workers.scraper import Scraper

WORKERS = 8
BLOCK_BYTES = 512


def prompts(size: int, seed: int) -> Iterator[bytes]:
    """That nobody had before."""
    pool = random.Random(seed).randbytes(1 << 22)
    number = 0
    while True:
        number += 1
        at = number * 4097 % (len(pool) - size)
        yield b"%d/%d " % (seed, number) + pool[at : at + size]


def fill(index: PrefixIndex, size: int) -> None:
    chain = index.chain()
    for number, text in enumerate(prompts(size, 1)):
        chain.load(text)
        index.insert(number % WORKERS, chain)
        index.insert(WORKERS, chain)
        if index.totals()["memory_evictions"]:
            return


def hammer(fd: int, pipe: Connection) -> None:
    """Like a busy shard; answers each message with waits (microseconds, sorted) since the one before, and timeouts."""
    index = PrefixIndex.attach(fd)
    chain, out, waits = index.chain(), array("Q", bytes(8 * (WORKERS + 1))), []
    missed = 0
    for number, text in enumerate(prompts(32 << 10, 2)):
        chain.load(text)
        before = time.perf_counter()
        if index.lock():
            waits.append((time.perf_counter() - before) * 1e6)
            index.match(chain, out)
            index.insert(number % WORKERS, chain)
            index.unlock()
        else:
            missed += 1
        if pipe.poll():
            if pipe.recv() == "end":
                return
            pipe.send((sorted(waits), missed))
            waits, missed = [], 0


def show(what: str, told: tuple[list[float], int]) -> None:
    waits, missed = told
    at = [waits[int(len(waits) * share)] for share in (0.5, 0.99, 0.999)]
    print(f"{what:14} {len(waits)} locks, waited p50 {at[0]:.1f}, p99 {at[1]:.1f}, p99.9 {at[2]:.1f}, "
          f"max {waits[-1]:.0f} us; {missed} given up")  # fmt: skip


async def save_for(saver: StateSaver, seconds: float) -> None:
    until = time.monotonic() + seconds
    walls: list[float] = []
    sizes: list[int] = []
    before = time.process_time()
    while not walls or time.monotonic() < until:
        saved = await saver.save()
        walls.append(saved.seconds)
        sizes.append(saved.size_bytes)
    cpu = (time.process_time() - before) / len(walls)
    print(f"saved {len(walls)} times: {sizes[-1] / 2**20:.1f} MiB, {cpu:.3f} s CPU, {min(walls):.3f} s at best each")


def load(path: Path, size_mib: int) -> None:
    found = saved_state.read(path, block_bytes=BLOCK_BYTES, max_age_s=3600, now=time.time())
    assert found is not None
    index = PrefixIndex.create(size_mib, WORKERS + 1, block_bytes=BLOCK_BYTES, seed=found.description.seed)
    before = time.process_time()
    one = IndexLoad(index, found.records, range(WORKERS + 1))
    while not one.add(1000):
        pass
    one.sort()
    while not one.renew(1000):
        pass
    print(f"loaded {one.added} blocks in {time.process_time() - before:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--prompt-bytes", type=int, default=16 << 10)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    segment = Segment.create(1, WORKERS)
    state = RoutingState.create(segment, IndexSize(arguments.size_mib, BLOCK_BYTES), 2**40)
    fill(state.index, arguments.prompt_bytes)
    totals = state.index.totals()
    print(f"{totals['blocks_used']} blocks, {totals['holdings_used']} of them held")
    ours, theirs = Pipe()
    shard = Process(target=hammer, args=(state.index.fd, theirs), daemon=True)

    def since_last() -> tuple[list[float], int]:
        ours.send("tell")
        told: tuple[list[float], int] = ours.recv()
        return told

    with tempfile.TemporaryDirectory() as directory:
        settings = Settings(runtime_dir=directory, state_dir=directory, prefix_block_bytes=BLOCK_BYTES)
        registry = Registry(WORKERS, str)
        scraper = Scraper(segment, None, lambda *_: None, lambda *_: None)  # type: ignore[arg-type]
        saver = StateSaver(state, settings, registry, scraper, Residency(state, settings, lambda: Snapshot(0)))
        asyncio.run(save_for(saver, 0))
        load(Path(directory) / saved_state.FILE_NAME, arguments.size_mib)
        shard.start()
        since_last()
        time.sleep(arguments.seconds)
        show("alone", since_last())
        asyncio.run(save_for(saver, arguments.seconds))
        show("while saving", since_last())
        ours.send("end")
        shard.join(5)


if __name__ == "__main__":
    main()
