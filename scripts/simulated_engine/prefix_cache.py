"""The KV memory of one engine: blocks that are private, pinned, idle or free.

A block of a running sequence is *private* until all its tokens are computed; then it is *committed* under
its chained hash and can be hit by others. While any sequence uses it, it is *pinned*. When the last one
releases it, it becomes *idle*: still a hit, but the oldest idle block is evicted when memory is short.

Hashes are chained (a hash stands for the block and everything before it), so whoever pins a block pins
its ancestors too. A release puts the tail in front of its ancestors, hence eviction always takes leaves.
"""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """LRU cache of `capacity_blocks` blocks, addressed by chained block hashes."""

    __slots__ = ("_idle", "_pins", "_stale", "capacity_blocks", "private_blocks")

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.private_blocks = 0
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Blocks in use when the cache was flushed: never hit again, forgotten once released.
        self._stale: set[int] = set()

    @property
    def used_blocks(self) -> int:
        return self.private_blocks + len(self._pins)

    @property
    def cached_blocks(self) -> int:
        return len(self._pins) + len(self._idle)

    @property
    def available_blocks(self) -> int:
        """Free blocks, and idle ones that an admission may evict."""
        return self.capacity_blocks - self.used_blocks

    def match(self, blocks: Sequence[int], limit: int) -> int:
        """The number of leading blocks that are cached, at most `limit`."""
        pins, idle, stale = self._pins, self._idle, self._stale
        depth = 0
        for block in blocks[:limit]:
            if block not in idle and (block not in pins or block in stale):
                break
            depth += 1
        return depth

    def admit(self, blocks: Sequence[int], matched: int, private: int) -> bool:
        """Pins the first `matched` blocks and takes `private` new ones, or changes nothing."""
        hits = blocks[:matched]
        idle_hits = sum(1 for block in hits if block in self._idle)
        if private > self.available_blocks - idle_hits:
            return False
        for block in hits:
            self._pin(block)
        self.private_blocks += private
        self._evict()
        return True

    def commit(self, block: int) -> bool:
        """Turns a private block into a pinned one; False if it has to stay private."""
        if block in self._stale:
            return False
        self._pin(block)
        self.private_blocks -= 1
        return True

    def release(self, blocks: Sequence[int], private: int) -> None:
        """Gives back what one sequence holds: its pinned blocks in prompt order, and its private ones."""
        self.private_blocks -= private
        for block in reversed(blocks):
            pins = self._pins[block] - 1
            if pins:
                self._pins[block] = pins
                continue
            del self._pins[block]
            if block in self._stale:
                self._stale.discard(block)
            else:
                self._idle[block] = None

    def flush(self) -> None:
        """Forgets every block: idle ones now, pinned ones as they are released."""
        self._idle.clear()
        self._stale.update(self._pins)

    def _pin(self, block: int) -> None:
        self._idle.pop(block, 0)
        self._pins[block] = self._pins.get(block, 0) + 1

    def _evict(self) -> None:
        excess = self.private_blocks + self.cached_blocks - self.capacity_blocks
        for _ in range(excess):
            self._idle.popitem(last=False)
