"""The prefix index as a tree: the scenarios that the SGLang router's tree is tested with, and what is ours."""

import os
import random
from array import array
from collections.abc import Callable

import pytest

from pointsman.daemon.shm.prefix_index import NO_PIN, PrefixIndex, PrefixIndexError
from pointsman.daemon.shm.prefix_layout import MAGIC, PrefixLayout

SLOTS = 4
BLOCK = 16


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex.create(1, SLOTS, block_bytes=BLOCK, seed=1)


def match(index: PrefixIndex, text: bytes | str, salt: str = "") -> list[int]:
    out = array("Q", [99] * index.totals()["slots"])
    best = index.match(index.chain().load(encoded(text), salt), out)
    assert best == max(out)
    return list(out)


def insert(index: PrefixIndex, slot: int, text: bytes | str, salt: str = "") -> int:
    return index.insert(slot, index.chain().load(encoded(text), salt))


def pin(index: PrefixIndex, slot: int, text: bytes | str, shard: int = 0) -> int:
    return index.pin(slot, index.chain().load(encoded(text)), shard)


def encoded(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


def in_child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def ended_well(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


# --- matching


def test_a_cold_index_matches_nothing(index: PrefixIndex) -> None:
    assert match(index, "hello") == [0] * SLOTS
    assert index.smallest_tenant(range(SLOTS)) == 0
    assert index.smallest_tenant([]) == -1


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "hello",
        "x" * 15,
        "x" * 16,
        "x" * 17,
        "x" * 160,
        "héllo wörld " * 9,
        "你好世界" * 20,
        "👩‍👩‍👧‍👦 emoji 🚂" * 11,
        "\0" * 40,
    ],
    ids=lambda text: f"{len(text)} chars",
)
def test_an_exact_repeat_matches_completely(index: PrefixIndex, text: str) -> None:
    size = len(text.encode())
    assert insert(index, 2, text) == size
    assert match(index, text) == [0, 0, size, 0]
    assert index.size(2) == size
    assert index.blocks(2) == -(-size // BLOCK)


def test_an_empty_prompt_holds_nothing(index: PrefixIndex) -> None:
    assert insert(index, 0, "") == 0
    assert match(index, "") == [0] * SLOTS
    assert pin(index, 0, "") == NO_PIN
    assert index.totals()["blocks_used"] == 0


def test_a_partial_match_counts_whole_blocks(index: PrefixIndex) -> None:
    insert(index, 0, "a" * 40)
    assert match(index, "a" * 35 + "b" * 20)[0] == 32
    assert match(index, "a" * 15 + "b" * 20)[0] == 0
    assert match(index, "b" + "a" * 39)[0] == 0


def test_a_prefix_of_a_known_prompt_matches_its_full_blocks(index: PrefixIndex) -> None:
    insert(index, 0, "a" * 64)
    assert match(index, "a" * 48)[0] == 48
    assert match(index, "a" * 47)[0] == 32
    insert(index, 0, "a" * 47)
    assert match(index, "a" * 47)[0] == 47
    assert index.size(0) == 64 + 15


def test_a_longer_prompt_matches_what_it_continues(index: PrefixIndex) -> None:
    insert(index, 0, "a" * 32)
    insert(index, 1, "a" * 64)
    assert match(index, "a" * 80) == [32, 64, 0, 0]


def test_utf8_that_differs_inside_a_character_shares_the_blocks_before(index: PrefixIndex) -> None:
    one, other = "日" * 16 + "語", "日" * 16 + "誤"
    insert(index, 0, one)
    assert match(index, other)[0] == 48


def test_models_do_not_share(index: PrefixIndex) -> None:
    insert(index, 0, "a" * 64, "llama")
    assert match(index, "a" * 64, "qwen")[0] == 0
    assert match(index, "a" * 64, "llama")[0] == 64


def test_matching_renews_nothing(index: PrefixIndex) -> None:
    insert(index, 0, "old " * 8)
    insert(index, 0, "new " * 8)
    match(index, "old " * 8)
    index.evict(0, 32)
    assert match(index, "old " * 8)[0] == 0
    assert match(index, "new " * 8)[0] == 32


def test_match_and_insert_is_both(index: PrefixIndex) -> None:
    insert(index, 1, "a" * 32)
    out = array("Q", bytes(8 * SLOTS))
    chain = index.chain().load(b"a" * 40)
    assert index.match_and_insert(chain, 0, out) == 32
    assert list(out) == [0, 32, 0, 0]
    assert index.match_and_insert(chain, 0, out) == 40
    assert index.check() == []


def test_many_workers_on_one_prompt() -> None:
    index = PrefixIndex.create(1, 256, block_bytes=BLOCK)
    for slot in range(256):
        insert(index, slot, "a" * 100)
    assert match(index, "a" * 100) == [100] * 256
    assert index.totals()["blocks_used"] == 7
    for slot in range(255):
        index.remove_worker(slot)
    assert match(index, "a" * 100) == [0] * 255 + [100]
    assert index.check() == []


def test_a_very_long_prompt() -> None:
    index = PrefixIndex.create(16, 2)
    text = random.Random(0).randbytes(10_000_000)
    assert insert(index, 1, text) == len(text)
    assert match(index, text + b"more") == [0, len(text) // 512 * 512]
    token = pin(index, 1, text)
    assert index.pinned(1) == len(text)
    assert index.unpin(token)
    assert (index.pinned(1), index.check()) == (0, [])


def test_a_prompt_larger_than_the_index_keeps_its_head() -> None:
    index = PrefixIndex.create(0.0635, 1, block_bytes=BLOCK)
    text = random.Random(0).randbytes(100_000)
    held = insert(index, 0, text)
    assert 0 < held < len(text)
    assert match(index, text) == [held]
    assert index.totals()["truncations"] == 1
    assert index.check() == []


# --- eviction


def test_the_least_recently_used_goes_first(index: PrefixIndex) -> None:
    for name in "abcd":
        insert(index, 0, name * 16)
    insert(index, 0, "a" * 16)
    index.evict(0, 32)
    assert [match(index, name * 16)[0] for name in "abcd"] == [16, 0, 0, 16]


def test_leaves_go_before_what_they_continue(index: PrefixIndex) -> None:
    insert(index, 0, "s" * 32 + "a" * 32)
    insert(index, 0, "s" * 32 + "b" * 32)
    index.evict(0, 80)
    assert match(index, "s" * 32 + "a" * 32)[0] == 48
    index.evict(0, 64)
    assert match(index, "s" * 32 + "a" * 32)[0] == 32
    index.evict(0, 16)
    assert match(index, "s" * 32 + "b" * 32)[0] == 16


def test_workers_are_evicted_apart(index: PrefixIndex) -> None:
    for slot in (0, 1):
        insert(index, slot, "a" * 64)
    while index.evict(0, 0):
        pass
    assert match(index, "a" * 64) == [0, 64, 0, 0]
    assert (index.size(0), index.size(1)) == (0, 64)


def test_a_capacity_holds_at_once_and_later(index: PrefixIndex) -> None:
    for name in "abcd":
        insert(index, 0, name * 32)
    index.set_capacity(0, 70)
    assert index.size(0) <= 70
    for name in "efgh":
        insert(index, 0, name * 32)
        assert index.size(0) <= 70
        assert match(index, name * 32)[0] == 32
    assert insert(index, 0, "z" * 200) == 64
    assert index.size(0) == 64


def test_a_full_index_evicts_and_never_fails() -> None:
    index = PrefixIndex.create(0.0635, SLOTS, block_bytes=BLOCK)
    totals = index.totals()
    for i in range(totals["block_count"]):
        text = b"%08d" % i * 8
        assert insert(index, i % SLOTS, text) == 64
        assert match(index, text)[i % SLOTS] == 64
    assert index.totals()["memory_evictions"] > 0
    assert index.totals()["blocks_used"] <= totals["block_count"]
    assert index.check() == []


def test_for_memory_the_oldest_of_all_workers_goes_first(index: PrefixIndex) -> None:
    insert(index, 0, "s" * 32)
    insert(index, 1, "m" * 16)
    insert(index, 0, "s" * 32)
    index.shrink(0, 16, 1000, 1)  # what remains was used with the chain, after worker 1's
    totals = index.totals()
    free = totals["block_count"] - totals["blocks_used"]
    assert index.make_room(free + 1, 0, 1000) == (1, False)
    assert (index.size(0), index.size(1)) == (16, 0)


def test_background_eviction_runs_in_slices_and_ends_when_told(index: PrefixIndex) -> None:
    for i in range(2000):
        insert(index, i % 2, b"%016d" % i)
    slices = index.evict_to(160, slice_us=0)
    assert next(slices) > 0
    slices.close()  # type: ignore[attr-defined]
    assert index.size(0) > 160
    for _ in index.evict_to(160, slice_us=0):
        assert index.check() == []
    assert (index.size(0), index.size(1)) == (160, 160)


def test_background_eviction_without_a_limit_keeps_a_part_free() -> None:
    index = PrefixIndex.create(0.0635, 1, block_bytes=BLOCK)
    totals = index.totals()
    for i in range(totals["block_count"]):
        insert(index, 0, b"%016d" % i)
    assert sum(index.evict_to(0)) == totals["block_count"] // 16
    assert list(index.evict_to(0)) == []


def test_evicting_to_nothing_leaves_nothing(index: PrefixIndex) -> None:
    insert(index, 0, "a" * 100)
    while index.evict(0, 0):
        pass
    totals = index.totals()
    assert (totals["blocks_used"], totals["holdings_used"], index.blocks(0)) == (0, 0, 0)


# --- pins


def test_what_is_pinned_is_not_evicted(index: PrefixIndex) -> None:
    token = pin(index, 0, "a" * 40)
    insert(index, 0, "b" * 40)
    while index.evict(0, 0):
        pass
    assert match(index, "a" * 40)[0] == 40
    assert (index.size(0), index.pinned(0)) == (40, 40)
    assert index.unpin(token) is True
    assert index.unpin(token) is False
    while index.evict(0, 0):
        pass
    assert index.size(0) == 0


def test_shared_pinned_blocks_count_once(index: PrefixIndex) -> None:
    tokens = [pin(index, 0, "s" * 32 + name * 16) for name in "abc"]
    assert index.pinned(0) == 32 + 3 * 16
    assert all(index.unpin(token) for token in tokens[:2])
    assert index.pinned(0) == 48
    assert index.unpin(tokens[2])
    assert index.pinned(0) == 0
    assert index.check() == []


def test_pins_do_not_exceed_a_capacity_unless_they_may(index: PrefixIndex) -> None:
    index.set_capacity(0, 64)
    chain = index.chain()
    first = index.pin(0, chain.load(b"a" * 48))
    second = index.pin(0, chain.load(b"b" * 48))
    assert (index.size(0), match(index, "b" * 48)[0]) == (64, 16)
    third = index.pin(0, chain.load(b"c" * 48), may_exceed=True)
    assert index.size(0) == 112
    assert index.insert(0, chain.load(b"d" * 48)) == 0
    for token in (first, second, third):
        assert index.unpin(token)
    assert index.size(0) <= 64
    assert index.check() == []


def test_pin_records_run_out_without_a_failure() -> None:
    index = PrefixIndex.create(0.0635, 1, block_bytes=BLOCK)
    count = index.totals()["pin_count"]
    tokens = [pin(index, 0, "a" * 32) for _ in range(count)]
    assert len(set(tokens)) == count
    assert pin(index, 0, "b" * 16) == NO_PIN
    assert match(index, "b" * 16) == [16]
    assert index.totals()["pin_failures"] == 1
    assert index.reclaim_shard(0) == count
    assert index.check() == []


def test_a_dead_shards_pins_are_given_back_and_only_its(index: PrefixIndex) -> None:
    mine, its = pin(index, 0, "a" * 32, shard=0), pin(index, 0, "b" * 32, shard=1)
    assert index.reclaim_shard(1) == 1
    assert index.pinned(0) == 32
    assert index.unpin(its) is False
    assert index.unpin(mine) is True


def test_a_token_is_not_good_for_the_next_user_of_its_record(index: PrefixIndex) -> None:
    old = pin(index, 0, "a" * 32)
    index.unpin(old)
    new = pin(index, 0, "a" * 32)
    assert index.unpin(old) is False
    assert index.pinned(0) == 32
    assert index.unpin(new) is True
    for nonsense in (1 << 62, 0xFFFFFFFF, 7 << 32 | 1):
        assert index.unpin(nonsense) is False


# --- forgetting


def test_removing_a_worker_leaves_nothing_of_it(index: PrefixIndex) -> None:
    insert(index, 0, "a" * 64)
    insert(index, 1, "a" * 32)
    token = pin(index, 0, "a" * 80)
    index.remove_worker(0)
    assert match(index, "a" * 80) == [0, 32, 0, 0]
    assert (index.size(0), index.blocks(0), index.pinned(0)) == (0, 0, 0)
    assert index.unpin(token) is False
    assert index.totals()["blocks_used"] == 2
    index.remove_worker(1)
    index.remove_worker(3)
    assert index.totals()["blocks_used"] == 0
    assert index.check() == []


def test_nothing_is_matched_from_the_first_moment_of_forgetting(index: PrefixIndex) -> None:
    for i in range(3000):
        insert(index, 0, b"%016d" % i)
    insert(index, 0, "kept" * 8)
    insert(index, 1, "kept" * 8)
    steps = index.forget(0, slice_us=0)
    next(steps)
    assert index.is_forgetting(0)
    assert index.size(0) > 0
    assert match(index, "kept" * 8) == [0, 32, 0, 0]
    insert(index, 0, "new " * 8)
    for _ in steps:
        assert index.check() == []
    assert match(index, "new " * 8)[0] == 32
    assert index.size(0) == 32


def test_forgetting_left_off_is_finished_by_background_eviction(index: PrefixIndex) -> None:
    for i in range(3000):
        insert(index, 0, b"%016d" % i)
    next(index.forget(0, slice_us=0))
    for _ in index.evict_to(0):
        pass
    assert not index.is_forgetting(0)
    assert index.size(0) == 0


# --- creation, attachment, several processes


def test_attach_sees_the_same_index(index: PrefixIndex) -> None:
    other = PrefixIndex.attach(index.fd)
    insert(index, 0, "a" * 40)
    assert match(other, "a" * 40)[0] == 40
    other.remove_worker(0)
    assert match(index, "a" * 40)[0] == 0


def test_a_foreign_segment_is_refused() -> None:
    fd = os.memfd_create("foreign")
    with pytest.raises(PrefixIndexError, match="too small"):
        PrefixIndex.attach(fd)
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(PrefixIndexError, match="no prefix index"):
        PrefixIndex.attach(fd)
    index = PrefixIndex.create(1, 4)
    memoryview(index.memory)[8:16] = array("Q", [999]).tobytes()
    with pytest.raises(PrefixIndexError, match="version"):
        PrefixIndex.attach(index.fd)
    memoryview(index.memory)[0:24] = array("Q", [MAGIC, 1, 12345]).tobytes()
    with pytest.raises(PrefixIndexError, match="header"):
        PrefixIndex.attach(index.fd)


@pytest.mark.parametrize(("size_mib", "slots", "block_bytes"), [(0.01, 4, 512), (1, 0, 512), (1, 257, 512), (1, 4, 8)])
def test_impossible_sizes_are_refused(size_mib: float, slots: int, block_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"few|slots|block"):
        PrefixIndex.create(size_mib, slots, block_bytes=block_bytes)


@pytest.mark.parametrize("size", [1 << 17, 1 << 20, 10_000_000, 1 << 26, 1 << 30])
def test_the_layout_uses_what_it_is_given(size: int) -> None:
    layout = PrefixLayout.fitting(size, 64)
    assert layout.size_bytes <= size
    # The table doubles at a power of two, so there is at most one table's doubling to lose.
    assert layout.size_bytes > size * 0.85 - 40_000


def test_bad_arguments_are_refused(index: PrefixIndex) -> None:
    chain = index.chain().load(b"a")
    for slot in (-1, SLOTS):
        with pytest.raises(IndexError):
            index.insert(slot, chain)
        with pytest.raises(IndexError):
            index.size(slot)
    with pytest.raises(IndexError):
        index.pin(0, chain, shard=1 << 16)
    with pytest.raises(ValueError, match="8 bytes per worker slot"):
        index.match(chain, bytearray(8))
    with pytest.raises(RuntimeError):
        index.unlock()
    with index.locked(), pytest.raises(RuntimeError):
        index.lock()


def test_match_pick_and_pin_are_one_step_under_the_lock(index: PrefixIndex) -> None:
    def route() -> None:
        mine = PrefixIndex.attach(index.fd)
        out, chain = array("Q", bytes(8 * SLOTS)), mine.chain()
        for i in range(500):
            chain.load(b"%08d" % i * 4)
            while not mine.lock(1_000_000):
                pass
            if mine.match(chain, out) == 0:
                mine.pin(mine.smallest_tenant(range(SLOTS)), chain)
            mine.unlock()

    pids = [in_child(route) for _ in range(3)]
    assert all(ended_well(pid) for pid in pids)
    assert sum(index.size(slot) for slot in range(SLOTS)) == 500 * 32
    assert {index.size(slot) for slot in range(SLOTS)} == {500 * 32 // SLOTS}
    assert index.totals()["pins_used"] == 500
    assert index.check() == []


def test_high_contention_on_one_prefix_from_several_processes(index: PrefixIndex) -> None:
    def work(name: int) -> None:
        mine, rng = PrefixIndex.attach(index.fd), random.Random(name)
        mine_chain, tokens = mine.chain(), []
        for i in range(2000):
            mine_chain.load(b"s" * 64 + b"%016d" % rng.randrange(100) * rng.randrange(3))
            slot = rng.randrange(SLOTS)
            action = i % 4
            if action == 0:
                mine.insert(slot, mine_chain)
            elif action == 1:
                tokens.append(mine.pin(slot, mine_chain, name))
            elif action == 2:
                mine.unpin(tokens.pop(0))
            else:
                mine.evict(slot, 200)
        for token in tokens:
            mine.unpin(token)

    pids = [in_child(lambda name=name: work(name)) for name in range(4)]  # type: ignore[misc]
    assert all(ended_well(pid) for pid in pids)
    for shard in range(4):  # those whose unpin met a busy lock at the very end
        index.reclaim_shard(shard)
    assert index.check() == []
    assert index.totals()["pins_used"] == 0
    for slot in range(SLOTS):
        assert index.pinned(slot) == 0
        index.remove_worker(slot)
    assert index.totals()["blocks_used"] == 0


def test_a_withdrawn_request_leaves_what_was_there_before_it() -> None:
    index = PrefixIndex.create(1, 2, block_bytes=64)
    out = array("Q", bytes(16))
    head, whole = index.chain().load(b"a" * 640), index.chain().load(b"a" * 640 + b"b" * 700)
    index.insert(0, head)
    token = index.pin(0, whole)
    assert index.match(whole, out) == 1340
    assert index.withdraw(token, 640) is True
    assert index.match(whole, out) == 640
    assert (index.size(0), index.pinned(0), index.check()) == (640, 0, [])
    assert index.withdraw(token, 640) is False


def test_a_withdrawal_spares_what_others_hold_on_to() -> None:
    index = PrefixIndex.create(1, 2, block_bytes=64)
    out = array("Q", bytes(16))
    short, long = index.chain().load(b"a" * 640), index.chain().load(b"a" * 1280)
    mine, others = index.pin(0, long), index.pin(0, short)
    index.insert(1, long)
    assert index.withdraw(mine) is True
    index.match(long, out)
    assert list(out) == [640, 1280]
    assert (index.pinned(0), index.check()) == (640, [])
    assert index.withdraw(others) is True
    index.match(long, out)
    assert list(out) == [0, 1280]
    assert (index.size(0), index.check()) == (0, [])
