"""Snapshots: what comes back, and which are refused with a reason."""

import random
from array import array
from contextlib import suppress

import pytest

from pointsman.daemon.shm.prefix_index import PrefixIndex, PrefixIndexError, read_seed

SLOTS = 4


def make(seed: int = 1, *, slots: int = SLOTS, block_bytes: int = 16, size_mib: float = 1) -> PrefixIndex:
    return PrefixIndex.create(size_mib, slots, block_bytes=block_bytes, seed=seed)


def populate(index: PrefixIndex, seed: int = 0) -> list[bytes]:
    rng, texts = random.Random(seed), [b""]
    for _ in range(300):
        text = rng.choice(texts) + rng.randbytes(rng.choice([3, 16, 50, 200]))
        texts.append(text)
        index.insert(rng.randrange(SLOTS), index.chain().load(text))
    return texts


def matches(index: PrefixIndex, texts: list[bytes]) -> list[list[int]]:
    chain, out, all_of_them = index.chain(), array("Q", bytes(8 * SLOTS)), []
    for text in texts:
        index.match(chain.load(text), out)
        all_of_them.append(list(out))
    return all_of_them


def test_a_dump_comes_back_with_its_order_of_use() -> None:
    one, other = make(), make()
    texts = populate(one)
    token = one.pin(0, one.chain().load(texts[5]))
    assert other.load(one.dump()) == one.totals()["holdings_used"]
    assert other.check() == []
    assert matches(other, texts) == matches(one, texts)
    assert one.unpin(token)
    for slot in range(SLOTS):
        assert other.held_blocks(slot) == one.held_blocks(slot)
        assert other.pinned(slot) == 0
    for slot in range(1, SLOTS):
        for _ in range(60):
            for index in (one, other):
                index.shrink(slot, 0, 1000, 1)
            assert other.held_blocks(slot) == one.held_blocks(slot)


def test_slots_are_renamed_or_left_out() -> None:
    one, other = make(), make()
    populate(one)
    other.load(one.dump(), {0: 3, 2: 1})
    assert other.held_blocks(3) == one.held_blocks(0)
    assert other.held_blocks(1) == one.held_blocks(2)
    assert (other.size(0), other.size(2)) == (0, 0)
    assert other.check() == []


def test_a_dump_is_added_to_what_is_there() -> None:
    one, other = make(), make()
    texts = populate(one)
    for text in texts[:50]:
        other.insert(1, other.chain().load(text))
    before = other.held_blocks(1)
    other.load(one.dump())
    assert other.held_blocks(1) == before | one.held_blocks(1)
    other.load(one.dump())
    assert other.check() == []


def test_a_smaller_index_takes_what_fits() -> None:
    one, other = make(), make(size_mib=0.0635)
    populate(one)
    added = other.load(one.dump())
    assert 0 < added <= other.totals()["holding_count"]
    assert other.check() == []


def test_a_worker_being_forgotten_is_not_in_the_dump() -> None:
    one, other = make(), make()
    populate(one)
    one.forget_begin(0)
    other.load(one.dump())
    assert other.size(0) == 0
    assert other.size(1) == one.size(1)


def test_an_empty_index_has_a_dump() -> None:
    assert make().load(make().dump()) == 0


def test_a_foreign_dump_is_refused_with_the_reason() -> None:
    one = make()
    populate(one)
    dump = one.dump()
    assert read_seed(dump) == 1
    with pytest.raises(PrefixIndexError, match="seed"):
        make(2).load(dump)
    with pytest.raises(PrefixIndexError, match="blocks of 16 bytes"):
        make(block_bytes=32).load(dump)
    with pytest.raises(PrefixIndexError, match="version"):
        make().load(dump[:8] + b"\x09" + dump[9:])
    with pytest.raises(PrefixIndexError, match="not a dump"):
        make().load(b"")
    with pytest.raises(PrefixIndexError, match="length"):
        make().load(dump[:-1])


def test_a_broken_dump_is_refused_wherever_it_is_broken() -> None:
    one, other = make(), make()
    populate(one)
    dump = one.dump()
    for at in random.Random(1).sample(range(len(dump)), 200):
        broken = bytearray(dump)
        broken[at] ^= 0x40
        with pytest.raises(PrefixIndexError):
            other.load(bytes(broken))
    assert other.totals()["blocks_used"] == 0


def test_records_that_lie_leave_a_sound_index() -> None:
    """The checksum keeps accidents out; whoever can write it can still do no harm to the memory."""
    rng = random.Random(2)
    one = make()
    populate(one)
    records = one.dump_records()
    for _ in range(300):
        other = make(size_mib=0.0635)
        broken = bytearray(records)
        for _ in range(rng.choice([1, 5])):
            at = rng.randrange(len(broken))
            broken[at] = rng.randrange(256)
        with suppress(ValueError):
            other.load_records(broken[: rng.choice([len(broken), rng.randrange(len(broken))])], range(SLOTS))
        assert other.check() == []
