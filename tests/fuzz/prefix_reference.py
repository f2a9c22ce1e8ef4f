"""The prefix index in plain Python: what the native one must agree with, block for block and in the order of eviction.

Per worker an ordered dict of the blocks that no request pins, oldest first. A use renews a chain from its end to its
head, so the oldest block is always a leaf. Slow and obvious.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from pointsman.daemon.shm.prefix import HashChain


@dataclass
class Held:
    capacity: int = 0
    epoch: int = 0
    idle: OrderedDict[int, int] = field(default_factory=OrderedDict)
    pins: dict[int, tuple[int, int]] = field(default_factory=dict)
    """hash -> (requests, characters)"""

    @property
    def chars(self) -> int:
        return sum(self.idle.values()) + self.pinned

    @property
    def pinned(self) -> int:
        return sum(chars for _, chars in self.pins.values())


@dataclass(frozen=True)
class Pin:
    slot: int
    epoch: int
    blocks: tuple[tuple[int, int], ...]


class PlainPrefixIndex:
    """Memory is unlimited here: compare with a native index that is large enough."""

    def __init__(self, slots: int) -> None:
        self.held = [Held() for _ in range(slots)]

    def match(self, chain: HashChain) -> list[int]:
        return [sum(chars for _, chars in self._prefix(slot, chain)) for slot in range(len(self.held))]

    def _prefix(self, slot: int, chain: HashChain) -> list[tuple[int, int]]:
        held, prefix = self.held[slot], []
        for block, chars in blocks_of(chain):
            if block not in held.idle and block not in held.pins:
                break
            prefix.append((block, chars))
        return prefix

    def insert(self, slot: int, chain: HashChain) -> None:
        held = self.held[slot]
        for block, chars in reversed(blocks_of(chain)):
            if block not in held.pins:
                held.idle[block] = chars
                held.idle.move_to_end(block)
        self.evict(slot, held.capacity)

    def pin(self, slot: int, chain: HashChain) -> Pin:
        """As with `may_exceed`."""
        held = self.held[slot]
        for block, chars in reversed(blocks_of(chain)):
            held.idle.pop(block, None)
            held.pins[block] = (held.pins.get(block, (0, 0))[0] + 1, chars)
        self.evict(slot, held.capacity)
        return Pin(slot, held.epoch, tuple(blocks_of(chain)))

    def unpin(self, pin: Pin) -> bool:
        held = self.held[pin.slot]
        if pin.epoch != held.epoch:
            return False
        for block, chars in reversed(pin.blocks):
            requests, _ = held.pins.pop(block)
            if requests > 1:
                held.pins[block] = (requests - 1, chars)
            else:
                held.idle[block] = chars
        self.evict(pin.slot, held.capacity)
        return True

    def set_capacity(self, slot: int, chars: int) -> None:
        self.held[slot].capacity = chars
        self.evict(slot, chars)

    def evict(self, slot: int, to_chars: int, *, is_limit: bool = True) -> None:
        held = self.held[slot]
        while (to_chars or not is_limit) and held.idle and held.chars > to_chars:
            held.idle.popitem(last=False)

    def remove_worker(self, slot: int) -> None:
        held = self.held[slot]
        held.idle.clear()
        held.pins.clear()
        held.epoch += 1

    def blocks(self, slot: int) -> set[int]:
        return {*self.held[slot].idle, *self.held[slot].pins}


def blocks_of(chain: HashChain) -> list[tuple[int, int]]:
    hashes = chain.hash_list()
    sizes = [chain.block_chars] * len(hashes)
    if sizes:
        sizes[-1] = chain.total_chars - (len(hashes) - 1) * chain.block_chars
    return list(zip(hashes, sizes, strict=True))
