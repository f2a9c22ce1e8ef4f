"""Dumps of the index: what comes back, whatever the slices, and that nonsense does no harm."""

import random
from array import array
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.daemon.shm.prefix_dump import IndexDump, IndexLoad
from pointsman.daemon.shm.prefix_index import PrefixIndex

SLOTS = 4
AT_ONCE_US = 10_000_000


def make(seed: int = 1, *, slots: int = SLOTS, block_bytes: int = 16, size_mib: float = 1) -> PrefixIndex:
    return PrefixIndex.create(size_mib, slots, block_bytes=block_bytes, seed=seed)


def dump_of(index: PrefixIndex, slice_us: int = AT_ONCE_US) -> bytes:
    dump, pieces = IndexDump(index), []
    while not dump.is_done:
        pieces.append(dump.more(slice_us))
    return b"".join(pieces)


def load(index: PrefixIndex, records: bytes, slot_of: Sequence[int] = range(SLOTS), slice_us: int = AT_ONCE_US) -> int:
    one = IndexLoad(index, records, slot_of)
    while not one.add(slice_us):
        pass
    one.sort()
    while not one.renew(slice_us):
        pass
    return one.added


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
    assert load(other, dump_of(one)) == one.totals()["holdings_used"]
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
    load(other, dump_of(one), [3, -1, 1, -1])
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
    load(other, dump_of(one))
    assert other.held_blocks(1) == before | one.held_blocks(1)
    load(other, dump_of(one))
    assert other.check() == []


def test_a_smaller_index_takes_what_fits() -> None:
    one, other = make(), make(size_mib=0.0635)
    populate(one)
    added = load(other, dump_of(one))
    assert 0 < added <= other.totals()["holding_count"]
    assert other.check() == []


def test_a_worker_being_forgotten_is_not_in_the_dump() -> None:
    one, other = make(), make()
    populate(one)
    one.forget_begin(0)
    load(other, dump_of(one))
    assert other.size(0) == 0
    assert other.size(1) == one.size(1)


def test_an_empty_index_has_a_dump() -> None:
    assert load(make(), dump_of(make())) == 0


def test_records_that_lie_leave_a_sound_index() -> None:
    """The checksum of the file keeps accidents out; whoever can write it can still do no harm to the memory."""
    rng = random.Random(2)
    one = make()
    populate(one)
    records = dump_of(one)
    for _ in range(300):
        other = make(size_mib=0.0635)
        broken = bytearray(records)
        for _ in range(rng.choice([1, 5])):
            at = rng.randrange(len(broken))
            broken[at] = rng.randrange(256)
        with suppress(ValueError):
            load(other, bytes(broken[: rng.choice([len(broken), rng.randrange(len(broken))])]))
        assert other.check() == []


def test_records_cut_off_are_refused() -> None:
    one = make()
    populate(one)
    records = dump_of(one)
    for size in (1, 8, 24, 32, len(records) - 8, len(records) - 1):
        with pytest.raises(ValueError, match=r"cut off|does not fit|whole words"):
            load(make(), records[:size])


def test_a_slot_that_does_not_exist_is_refused_before_anything_is_added() -> None:
    index = make()
    with pytest.raises(IndexError):
        IndexLoad(index, b"", [SLOTS])


TEXTS = st.lists(
    st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 3), st.integers(0, 12), st.integers(0, 15)), max_size=40
)


@given(uses=TEXTS, dump_us=st.sampled_from([0, AT_ONCE_US]), load_us=st.sampled_from([0, AT_ONCE_US]))
@settings(max_examples=60, deadline=None)
def test_what_is_loaded_matches_as_what_was_dumped(
    uses: list[tuple[int, int, int, int]], dump_us: int, load_us: int
) -> None:
    """For all workers and every prompt; in slices of one look at the clock, too. And the order of use is the same."""
    one, other, texts = make(), make(), []
    for slot, kind, blocks, rest in uses:
        texts.append(b"".join(b"%d:%014d" % (kind, number) for number in range(blocks)) + b"x" * rest)
        one.insert(slot, one.chain().load(texts[-1]))
    load(other, dump_of(one, dump_us), slice_us=load_us)
    assert other.check() == []
    assert matches(other, texts) == matches(one, texts)
    for slot in range(SLOTS):
        while one.size(slot):
            assert other.held_blocks(slot) == one.held_blocks(slot)
            one.shrink(slot, 0, 1000, 1)
            other.shrink(slot, 0, 1000, 1)
        assert other.size(slot) == 0


def test_what_changes_between_two_slices_makes_no_false_record() -> None:
    """A long climb is left in the middle while its blocks are evicted and their places taken by others."""
    rng = random.Random(3)
    for _ in range(30):
        one, other = make(size_mib=0.25), make(size_mib=0.25)
        texts = populate(one, rng.randrange(1000))
        long = [rng.randbytes(16 * 400) for _ in range(3)]
        for text in long:
            one.insert(0, one.chain().load(text))
        ever = {slot: one.held_blocks(slot) for slot in range(SLOTS)}
        dump, pieces = IndexDump(one), []
        while not dump.is_done:
            pieces.append(dump.more(0))
            if rng.random() < 0.3:
                one.shrink(0, rng.randrange(one.size(0) + 1), 1000)
                fresh = rng.choice([*texts, *long])[: 16 * rng.randrange(1, 50)] + rng.randbytes(rng.randrange(900))
                slot = rng.randrange(SLOTS)
                one.insert(slot, one.chain().load(fresh))
                for each in range(SLOTS):
                    ever[each] |= one.held_blocks(each)
        load(other, b"".join(pieces))
        assert other.check() == []
        for slot in range(SLOTS):
            assert other.held_blocks(slot) <= ever[slot]


def test_a_dump_does_not_wait_for_a_lock_that_is_kept() -> None:
    one = make()
    populate(one)
    dump, records = IndexDump(one), dump_of(one)
    other = PrefixIndex.attach(one.fd)
    with other.locked():
        with pytest.raises(TimeoutError):
            dump.more(100)
        with pytest.raises(TimeoutError):
            IndexLoad(one, records, range(SLOTS)).add(100)
    assert dump.more(AT_ONCE_US) == records
