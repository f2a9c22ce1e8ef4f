"""The prefix index: against a plain radix tree, against a slow model of its eviction, and the seed's scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.routing.index import UNLIMITED, Pin, PlainIndex
from pointsman.daemon.routing.prompt import EMPTY_CHAIN, Chain, Request, id_chain, text_chain

BLOCK = 4


def chain(text: str) -> Chain:
    return text_chain(text.encode(), block_bytes=BLOCK)


def unlimited(workers: int) -> PlainIndex:
    return PlainIndex([UNLIMITED] * workers)


def matched(index: PlainIndex, text: str) -> list[int]:
    found = chain(text)
    return [found.chars(depth) for depth in index.match(found)]


@dataclass
class Node:
    children: dict[str, Node] = field(default_factory=dict)
    holders: set[int] = field(default_factory=set)


class RadixTree:
    """Edges are characters, or pieces of any length: slow and plainly right."""

    def __init__(self) -> None:
        self._root = Node()

    def insert(self, pieces: Sequence[str], worker: int) -> None:
        node = self._root
        for piece in pieces:
            node = node.children.setdefault(piece, Node())
            node.holders.add(worker)

    def match(self, pieces: Sequence[str], worker: int) -> int:
        """Characters."""
        node, matched = self._root, 0
        for piece in pieces:
            child = node.children.get(piece)
            if child is None or worker not in child.holders:
                break
            node, matched = child, matched + len(piece)
        return matched

    def size(self, worker: int) -> int:
        def count(node: Node) -> int:
            return sum(len(p) * (worker in child.holders) + count(child) for p, child in node.children.items())

        return count(self._root)


def pieces(text: str) -> list[str]:
    return [text[start : start + BLOCK] for start in range(0, len(text), BLOCK)]


texts = st.text(alphabet="ab", max_size=14)
insertions = st.lists(st.tuples(texts, st.integers(0, 2)), max_size=25)


@given(insertions=insertions, asked=texts)
def test_matches_as_a_radix_tree_does_in_whole_blocks(insertions: list[tuple[str, int]], asked: str) -> None:
    index, tree = unlimited(3), RadixTree()
    for text, worker in insertions:
        index.insert(worker, chain(text))
        tree.insert(text, worker)
    for worker, found in enumerate(matched(index, asked)):
        exact = tree.match(asked, worker)
        is_repeat = any(text == asked and holder == worker for text, holder in insertions)
        # The tail is found by its exact text only; a full block by its content.
        assert found == (len(asked) if is_repeat else exact // BLOCK * BLOCK)


@given(insertions=insertions, asked=texts)
def test_sizes_and_matches_are_those_of_a_radix_tree_of_blocks(insertions: list[tuple[str, int]], asked: str) -> None:
    index, tree = unlimited(3), RadixTree()
    for text, worker in insertions:
        index.insert(worker, chain(text))
        tree.insert(pieces(text), worker)
    for worker in range(3):
        assert index.size(worker) == tree.size(worker)
        assert matched(index, asked)[worker] == tree.match(pieces(asked), worker)


@dataclass
class SlowResidency:
    """One worker: every block with its parent and the time of its last use; pinned ones counted."""

    capacity: int
    used: dict[int, float] = field(default_factory=dict)
    parents: dict[int, int | None] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    pins: dict[int, int] = field(default_factory=dict)

    def use(self, chain: Chain, now: float) -> None:
        parent = None
        for depth, block in enumerate(chain.hashes):
            self.used[block] = now
            self.parents[block] = parent
            self.sizes[block] = chain.chars(depth + 1) - chain.chars(depth)
            parent = block

    def evict(self, to_chars: int) -> None:
        while sum(self.sizes[block] for block in self.used) > to_chars:
            inner = {self.parents[block] for block in self.used}
            leaves = [block for block in self.used if block not in inner and not self.pins.get(block)]
            if not leaves:
                return
            del self.used[min(leaves, key=self.used.__getitem__)]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), texts),
        st.tuples(st.just("pin"), texts),
        st.tuples(st.just("unpin"), st.integers(0, 9)),
        st.tuples(st.just("evict"), st.integers(0, 40)),
        st.tuples(st.just("capacity"), st.integers(0, 60)),
        st.tuples(st.just("remove")),
    ),
    max_size=40,
)


@given(operations=operations, capacity=st.integers(0, 60))
def test_evicts_least_recently_used_leaves_and_counts_exactly(
    operations: list[tuple[str] | tuple[str, str | int]], capacity: int
) -> None:
    index, slow = PlainIndex([capacity, UNLIMITED]), SlowResidency(capacity)
    held: list[tuple[Chain, Pin]] = []
    for now, operation in enumerate(operations):
        match operation:
            case ("insert", str(text)):
                index.insert(0, chain(text))
                slow.use(chain(text), now)
                slow.evict(slow.capacity)
            case ("pin", str(text)):
                held.append((chain(text), index.pin(0, chain(text))))
                for block in chain(text).hashes:
                    slow.pins[block] = slow.pins.get(block, 0) + 1
                slow.use(chain(text), now)
                slow.evict(slow.capacity)
            case ("unpin", int(number)) if number < len(held):
                found, pin = held.pop(number)
                index.unpin(pin)
                if all(slow.pins.get(block) for block in found.hashes):
                    for block in found.hashes:
                        slow.pins[block] -= 1
                    slow.use(found, now)
                    slow.evict(slow.capacity)
            case ("evict", int(size)):
                index.evict(0, size)
                slow.evict(size)
            case ("capacity", int(size)):
                index.set_capacity(0, size)
                slow.capacity = size
                slow.evict(size)
            case ("remove",):
                index.remove_worker(0)
                for _, pin in held:
                    index.unpin(pin)  # void: nothing happens
                held.clear()
                slow = SlowResidency(slow.capacity)
            case _:
                pass
        assert index.size(0) == sum(slow.sizes[block] for block in slow.used)
        assert index.blocks(0) == len(slow.used)
        pinned = sum(slow.sizes[block] for block, count in slow.pins.items() if count)
        assert index.pinned(0) == pinned
        assert 0 <= index.size(0) <= max(slow.capacity, pinned)
        assert index.size(1) == 0


def test_unpinning_a_renewed_chain_keeps_what_came_before_it_alive_longest() -> None:
    index = PlainIndex([12])
    pin = index.pin(0, chain("aaaabbbb"))
    index.insert(0, chain("cccc"))
    index.unpin(pin)
    index.insert(0, chain("dddd"))
    assert matched(index, "aaaabbbb") == [8]
    assert matched(index, "cccc") == [0]


def test_an_exact_repeat_matches_completely_and_a_longer_prompt_does_not_match_the_tail() -> None:
    index = unlimited(2)
    index.insert(1, chain("aaaabb"))
    assert matched(index, "aaaabb") == [0, 6]
    assert matched(index, "aaaabbb") == [0, 4]
    assert matched(index, "aaaabbbb") == [0, 4]
    assert matched(index, "ab") == [0, 0]


def test_prompts_shorter_than_a_block_and_empty_ones() -> None:
    index = unlimited(1)
    index.insert(0, chain("é"))
    assert matched(index, "é") == [2]
    index.insert(0, EMPTY_CHAIN)
    assert index.match(EMPTY_CHAIN) == [0]
    assert index.size(0) == 2


def test_smallest_is_the_first_of_equals() -> None:
    index = unlimited(3)
    index.insert(0, chain("aaaa"))
    assert index.smallest([0, 1, 2]) == 1
    assert index.smallest([0]) == 0


def test_removing_a_worker_leaves_the_others_and_no_empty_entries() -> None:
    index = unlimited(2)
    index.insert(0, chain("aaaabbbb"))
    index.insert(1, chain("aaaa"))
    index.remove_worker(0)
    assert matched(index, "aaaabbbb") == [0, 4]
    assert len(index) == 1
    index.remove_worker(1)
    assert len(index) == 0


def test_capacity_zero_holds_nothing() -> None:
    index = PlainIndex([0])
    index.insert(0, chain("aaaabbbb"))
    assert (index.size(0), index.blocks(0)) == (0, 0)


def test_eviction_in_slices() -> None:
    index = unlimited(1)
    index.insert(0, chain("aaaabbbbccccdddd"))
    assert index.evict(0, 0, max_blocks=1) == 1
    assert matched(index, "aaaabbbbccccdddd") == [12]
    assert index.evict(0, 0) == 3


def test_model_and_lora_salt_the_chain() -> None:
    plain = Request(prompt=b"x" * 600)
    salted = [Request(prompt=b"x" * 600, model="m"), Request(prompt=b"x" * 600, model="m", lora="l")]
    ids = [Request(blocks=(1, 2), block_tokens=16, prompt_tokens=30, model=model) for model in ("", "m")]
    heads = {request.chain().hashes[0] for request in [plain, *salted, *ids]}
    assert len(heads) == 5


def test_block_ids_cover_the_prompt_and_no_more() -> None:
    found = id_chain((7, 8, 9), 512, 600)
    assert (list(found.hashes), found.chars(1), found.total_chars) == ([7, 8], 2048, 2400)
    assert id_chain((), 512, 600) is EMPTY_CHAIN
    with pytest.raises(ValueError, match="at least one token"):
        id_chain((1,), 0, 10)
