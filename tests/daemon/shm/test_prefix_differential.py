"""Native against plain Python: the same operations, then the same answers, block for block."""

import random
from array import array

import pytest

from pointsman.daemon.shm.prefix_index import PrefixIndex
from tests.fuzz.prefix_reference import Pin, PlainPrefixIndex

SLOTS = 5


class Pair:
    """Both indexes, driven alike."""

    def __init__(self, seed: int, *, size_mib: float = 2) -> None:
        self.rng = random.Random(seed)
        self.native = PrefixIndex.create(size_mib, SLOTS, block_bytes=16, seed=seed)
        self.plain = PlainPrefixIndex(SLOTS)
        self.chain = self.native.chain()
        self.matched = array("Q", bytes(8 * SLOTS))
        self.texts: list[bytes] = [b""]
        self.pins: list[tuple[int, Pin]] = []

    def text(self) -> bytes:
        """New, a repeat, a continuation, or a part of an earlier one."""
        rng = self.rng
        known = rng.choice(self.texts)
        text = rng.choice([known, known[: rng.randrange(len(known) + 1)], known, b""])
        if rng.random() < 0.6:
            text += rng.randbytes(rng.choice([1, 5, 15, 16, 17, 48, 200]))
        self.texts.append(text)
        del self.texts[:-60]
        return text

    def step(self) -> None:
        rng = self.rng
        slot = rng.randrange(SLOTS)
        chain = self.chain.load(self.text(), rng.choice(["", "", "", "lora"]))
        action = rng.random()
        if action < 0.4:
            self.plain.insert(slot, chain)
            self.native.insert(slot, chain)
        elif action < 0.6:
            token = self.native.pin(slot, chain, rng.randrange(3), may_exceed=True)
            pin = self.plain.pin(slot, chain)
            assert bool(token) == bool(pin.blocks)
            if token:
                self.pins.append((token, pin))
        elif action < 0.8 and self.pins:
            token, pin = self.pins.pop(rng.randrange(len(self.pins)))
            assert self.native.unpin(token) == self.plain.unpin(pin)
        elif action < 0.9:
            capacity = rng.choice([0, 0, 50, 300, 1000, 3000])
            self.native.set_capacity(slot, capacity)
            self.plain.set_capacity(slot, capacity)
        elif action < 0.97:
            to_chars = rng.choice([0, 100, 1000, 2000])
            while self.native.evict(slot, to_chars):
                pass
            self.plain.evict(slot, to_chars, is_limit=False)
        elif action < 0.98:
            self.native.remove_worker(slot)
            self.plain.remove_worker(slot)
        self.native.match(chain, self.matched)
        assert list(self.matched) == self.plain.match(chain)

    def compare(self) -> None:
        assert self.native.check() == []
        for slot in range(SLOTS):
            held = self.plain.held[slot]
            assert self.native.held_blocks(slot) == self.plain.blocks(slot)
            assert (self.native.size(slot), self.native.pinned(slot)) == (held.chars, held.pinned)
            assert self.native.blocks(slot) == len(held.idle) + len(held.pins)
        sizes = array("Q", bytes(8 * SLOTS))
        self.native.sizes(sizes)
        assert list(sizes) == [held.chars for held in self.plain.held]
        everyone = range(SLOTS)
        assert self.native.smallest_tenant(everyone) == min(everyone, key=lambda slot: self.plain.held[slot].chars)


@pytest.mark.parametrize("seed", range(12))
def test_the_same_operations_give_the_same_index(seed: int) -> None:
    pair = Pair(seed)
    for step in range(1500):
        pair.step()
        if step % 50 == 0:
            pair.compare()
    pair.compare()


def test_the_order_of_eviction_is_that_of_the_reference_to_the_last_block() -> None:
    for seed in range(20):
        pair = Pair(seed)
        for _ in range(150):
            slot = pair.rng.randrange(SLOTS)
            chain = pair.chain.load(pair.text())
            pair.native.insert(slot, chain)
            pair.plain.insert(slot, chain)
        for slot in range(SLOTS):
            while pair.native.size(slot):
                to_chars = pair.native.size(slot) - 1
                pair.native.shrink(slot, to_chars, 1000, 1)
                pair.plain.evict(slot, to_chars, is_limit=False)
                assert pair.native.held_blocks(slot) == pair.plain.blocks(slot)
        assert pair.native.totals()["blocks_used"] == 0


@pytest.mark.parametrize("slots", [1, 64, 65, 256])
def test_one_walk_tells_the_depth_of_every_worker(slots: int) -> None:
    rng = random.Random(slots)
    index = PrefixIndex.create(4, slots, block_bytes=16)
    plain = PlainPrefixIndex(slots)
    text = rng.randbytes(16 * 300 + 7)
    chain, matched = index.chain(), array("Q", bytes(8 * slots))
    for slot in range(slots):
        if rng.random() < 0.8:
            chain.load(text[: rng.choice([0, 1, 16, 16 * rng.randrange(301), len(text)])])
            index.insert(slot, chain)
            plain.insert(slot, chain)
    for end in (0, 1, 16, 17, 1600, 4799, 4800, len(text)):
        chain.load(text[:end])
        assert index.match(chain, matched) == max(plain.match(chain))
        assert list(matched) == plain.match(chain)
