"""Processes that use the index as fast as they can are killed at random moments; it stays exact and usable."""

import os
import random
import signal
import time
from array import array

from pointsman.daemon.shm.prefix_index import PrefixIndex

SLOTS = 4
KILLS = 60


def use_until_killed(fd: int, name: int) -> None:
    index, rng = PrefixIndex.attach(fd), random.Random(name)
    chain, out, tokens = index.chain(), array("Q", bytes(8 * SLOTS)), [0]
    while True:
        slot = rng.randrange(SLOTS)
        chain.load(b"s" * 16 * rng.randrange(9) + rng.randbytes(rng.randrange(200)))
        action = rng.random()
        if action < 0.5:
            index.match_and_insert(chain, slot, out)
        elif action < 0.75:
            tokens.append(index.pin(slot, chain, name % 2))
        elif action < 0.95:
            index.unpin(tokens.pop(rng.randrange(len(tokens))) if tokens else 0)
        elif action < 0.99:
            index.evict(slot, 500)
        else:
            index.remove_worker(slot)


def test_killed_at_random_moments() -> None:
    index = PrefixIndex.create(0.25, SLOTS, block_bytes=16)
    index.set_capacity(0, 3000)
    rng = random.Random(5)
    running: list[tuple[int, int]] = []

    def start(name: int) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                use_until_killed(index.fd, name)
            finally:
                os._exit(1)  # not killed: something was raised
        running.append((pid, name))

    start(0)
    start(1)
    for kill in range(2, 2 + KILLS):
        time.sleep(rng.random() * 0.02)  # the moment of the kill is what varies
        pid, name = running.pop(rng.randrange(2))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        while index.reclaim_shard(name % 2) < 0:
            pass
        assert index.check() == []
        assert index.size(0) <= 3000
        start(kill - kill % 2 + name % 2)
    for pid, _ in running:
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    for shard in (0, 1):
        index.reclaim_shard(shard)
    for slot in range(SLOTS):
        assert index.pinned(slot) == 0
        index.remove_worker(slot)
    assert index.check() == []
    totals = index.totals()
    assert (totals["blocks_used"], totals["pins_used"], totals["resets"]) == (0, 0, 0)
