"""The prefix index: which worker is believed to hold how much of a prompt.

One entry per block (addressed by its chained hash) serves all workers: it has a mask of those that hold it. Per
worker there is an order of last use. A use of a prompt renews its blocks from the tail to the head, so a block is
always younger than what continues it, and the oldest block of a worker is a leaf: eviction takes leaves first
without looking for them. Blocks of requests in flight are *pinned*: counted, matched, never evicted.

`PrefixIndex` is the contract; `PlainIndex` is the reference in plain Python, which other implementations are tested
against. Sizes are characters, workers are slot numbers from 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from pointsman.daemon.routing.prompt import Chain

UNLIMITED = 1 << 62


class Pin(NamedTuple):
    """Blocks held for a request in flight; void once its worker was forgotten."""

    worker: int
    chain: Chain
    epoch: int


class PrefixIndex(Protocol):
    def match(self, chain: Chain) -> list[int]:
        """For every worker, the number of leading blocks of `chain` that it holds: one walk for all. Renews nothing."""
        ...

    def insert(self, worker: int, chain: Chain) -> None:
        """The worker now holds all of `chain`, used just now; evicts what no longer fits."""
        ...

    def pin(self, worker: int, chain: Chain) -> Pin:
        """Like `insert`, and keeps the blocks until `unpin`."""
        ...

    def unpin(self, pin: Pin) -> None:
        """Renews the blocks and lets them go. A pin may be given back once."""
        ...

    def set_capacity(self, worker: int, chars: int) -> None:
        """Evicts what no longer fits. Pinned blocks stay: a worker's size is at most max(capacity, pinned)."""
        ...

    def evict(self, worker: int, to_chars: int, max_blocks: int = UNLIMITED) -> int:
        """Drops the least recently used leaves until the worker's size is at most `to_chars`.

        Stops after `max_blocks` (a slice) or when only pinned blocks are left. Returns the number dropped.
        """
        ...

    def remove_worker(self, worker: int) -> None:
        """Forgets all that the worker holds, and voids its pins."""
        ...

    def smallest(self, workers: Iterable[int]) -> int:
        """The one with the fewest characters, the first of equals."""
        ...

    def size(self, worker: int) -> int:
        """Characters held."""
        ...

    def blocks(self, worker: int) -> int:
        """Blocks held."""
        ...

    def pinned(self, worker: int) -> int:
        """Characters that requests in flight hold, shared blocks once."""
        ...


class _Block:
    __slots__ = ("holders", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.holders = 0


class _Residency:
    """What one worker holds. `idle` runs from the oldest to the youngest; `pins` counts requests in flight."""

    __slots__ = ("capacity", "epoch", "idle", "pinned", "pins", "size")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.epoch = 0
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.pins: dict[int, int] = {}
        self.size = 0
        self.pinned = 0


class PlainIndex:
    """`capacities`: characters per worker, one slot each."""

    def __init__(self, capacities: Sequence[int]) -> None:
        self._blocks: dict[int, _Block] = {}
        self._workers = [_Residency(capacity) for capacity in capacities]
        self._everyone = (1 << len(capacities)) - 1

    def __len__(self) -> int:
        """Entries, whoever holds them."""
        return len(self._blocks)

    def match(self, chain: Chain) -> list[int]:
        depths = [0] * len(self._workers)
        blocks = self._blocks
        holders, depth = self._everyone, 0
        for block_hash in chain.hashes:
            block = blocks.get(block_hash)
            still = holders & block.holders if block is not None else 0
            if still != holders:
                if depth:
                    _set(depths, holders & ~still, depth)
                holders = still
                if not still:
                    return depths
            depth += 1
        _set(depths, holders, depth)
        return depths

    def insert(self, worker: int, chain: Chain) -> None:
        residency = self._workers[worker]
        idle, pins = residency.idle, residency.pins
        size = chain.tail_chars()
        for block_hash in reversed(chain.hashes):
            if block_hash in idle:
                idle.move_to_end(block_hash)
            elif block_hash not in pins:
                self._hold(worker, residency, block_hash, size)
                idle[block_hash] = None
            size = chain.block_chars
        self._shrink(worker, residency, residency.capacity, UNLIMITED)

    def pin(self, worker: int, chain: Chain) -> Pin:
        residency = self._workers[worker]
        idle, pins = residency.idle, residency.pins
        size = chain.tail_chars()
        for block_hash in reversed(chain.hashes):
            count = pins.get(block_hash)
            if count is not None:
                pins[block_hash] = count + 1
            else:
                if block_hash in idle:
                    del idle[block_hash]
                    held = self._blocks[block_hash].size
                else:
                    held = self._hold(worker, residency, block_hash, size)
                residency.pinned += held
                pins[block_hash] = 1
            size = chain.block_chars
        self._shrink(worker, residency, residency.capacity, UNLIMITED)
        return Pin(worker, chain, residency.epoch)

    def unpin(self, pin: Pin) -> None:
        residency = self._workers[pin.worker]
        if pin.epoch != residency.epoch:
            return
        idle, pins, blocks = residency.idle, residency.pins, self._blocks
        for block_hash in reversed(pin.chain.hashes):
            count = pins[block_hash] - 1
            if count:
                pins[block_hash] = count
            else:
                del pins[block_hash]
                idle[block_hash] = None
                residency.pinned -= blocks[block_hash].size
        self._shrink(pin.worker, residency, residency.capacity, UNLIMITED)

    def set_capacity(self, worker: int, chars: int) -> None:
        residency = self._workers[worker]
        residency.capacity = chars
        self._shrink(worker, residency, chars, UNLIMITED)

    def evict(self, worker: int, to_chars: int, max_blocks: int = UNLIMITED) -> int:
        return self._shrink(worker, self._workers[worker], to_chars, max_blocks)

    def remove_worker(self, worker: int) -> None:
        residency = self._workers[worker]
        for block_hash in (*residency.idle, *residency.pins):
            self._drop(worker, residency, block_hash)
        residency.idle.clear()
        residency.pins.clear()
        residency.pinned = 0
        residency.epoch += 1

    def smallest(self, workers: Iterable[int]) -> int:
        return min(workers, key=lambda worker: self._workers[worker].size)

    def size(self, worker: int) -> int:
        return self._workers[worker].size

    def blocks(self, worker: int) -> int:
        residency = self._workers[worker]
        return len(residency.idle) + len(residency.pins)

    def pinned(self, worker: int) -> int:
        return self._workers[worker].pinned

    def _hold(self, worker: int, residency: _Residency, block_hash: int, size: int) -> int:
        """Returns the size of the block, which whoever brought it first has set."""
        block = self._blocks.get(block_hash)
        if block is None:
            block = self._blocks[block_hash] = _Block(size)
        block.holders |= 1 << worker
        residency.size += block.size
        return block.size

    def _shrink(self, worker: int, residency: _Residency, to_chars: int, max_blocks: int) -> int:
        idle, dropped = residency.idle, 0
        while residency.size > to_chars and idle and dropped < max_blocks:
            self._drop(worker, residency, idle.popitem(last=False)[0])
            dropped += 1
        return dropped

    def _drop(self, worker: int, residency: _Residency, block_hash: int) -> None:
        block = self._blocks[block_hash]
        residency.size -= block.size
        block.holders &= ~(1 << worker)
        if not block.holders:
            del self._blocks[block_hash]


def _set(depths: list[int], workers: int, depth: int) -> None:
    while workers:
        lowest = workers & -workers
        depths[lowest.bit_length() - 1] = depth
        workers ^= lowest
