"""The shared prefix index as the rest of the daemon uses it: a segment of its own, made once, inherited by all.

`PrefixIndex` adds to the native operations (`prefix.pyx`, where the theory is) what needs no speed: creation, work in
slices. Names of the operations are those of the SGLang router's tree, where it has them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.shm.mapping import Mapping
from pointsman.daemon.shm.prefix import HashChain, RawIndex
from pointsman.daemon.shm.prefix_layout import (
    HEADER_BYTES,
    MAX_BLOCK_CHARS,
    MIB,
    MIN_BLOCK_CHARS,
    PrefixLayout,
)

__all__ = ["NO_PIN", "SLICE_US", "HashChain", "PrefixIndex", "PrefixIndexError"]

SLICE_US = 1000
"""CPU time of one slice of background work."""
NO_PIN = 0
"""What `pin` answers when there is nothing to give back later."""
FREE_SHARE = 16
"""Background eviction keeps one in so many entries free, so that inserts seldom evict."""


class PrefixIndexError(PointsmanError):
    """A segment that is not one of this index: the message says why."""


class PrefixIndex(RawIndex):
    """One process' view of the index. Not for threads: every process of ours has one.

    Calls that find the index locked for 2 ms do not wait longer; they say so: `match` and `insert` by -1, `pin` by
    NO_PIN, `unpin` by None (it is made up for later).
    """

    fd: int
    memory: Mapping

    @classmethod
    def create(cls, size_mib: float, slots: int, *, block_bytes: int = 512, seed: int | None = None) -> Self:
        """A new index of at most `size_mib` for `slots` workers. See `populate`.

        About 170 bytes per block of `block_bytes`: 64 MiB hold 400,000. `seed` (64 bits) is drawn unless given; what
        another index held (prefix_dump) is of use under the same seed only. Raises ValueError for sizes that make none.
        """
        if not MIN_BLOCK_CHARS <= block_bytes <= MAX_BLOCK_CHARS:
            raise ValueError(f"a block has {MIN_BLOCK_CHARS} to {MAX_BLOCK_CHARS} bytes, not {block_bytes}")
        layout = PrefixLayout.fitting(int(size_mib * MIB), slots)
        fd = os.memfd_create("pointsman-prefix-index", os.MFD_CLOEXEC)
        os.ftruncate(fd, layout.size_bytes)
        memory = Mapping(fd, layout.size_bytes)
        memory.enlarge_pages()
        index = cls(memory, layout, secrets.randbits(64) if seed is None else seed, block_bytes)
        index.fd, index.memory = fd, memory
        return index

    @classmethod
    def attach(cls, fd: int) -> Self:
        """Raises PrefixIndexError when `fd` is not an index of this version."""
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES:
            raise PrefixIndexError("the segment is too small to be a prefix index")
        memory = Mapping(fd, size)
        try:
            index = cls(memory)
        except ValueError as error:
            raise PrefixIndexError(str(error)) from error
        index.fd, index.memory = fd, memory
        return index

    def populate(self, start: int = 0, size: int | None = None) -> None:
        """Have these bytes' pages made, or mapped where they are made: else the first touch of each waits for that.

        `start` is a multiple of the page size; without `size`, all from there on. A MiB takes 0.8 ms, mapped alone 0.2;
        of huge pages next to nothing.
        """
        self.memory.populate(start, len(self.memory) - start if size is None else size)

    @contextmanager
    def locked(self, deadline_us: int = 2000) -> Iterator[bool]:
        """For match, pick and pin as one step. Yields whether the lock is held (False after the deadline)."""
        held = self.lock(deadline_us)
        try:
            yield held
        finally:
            if held:
                self.unlock()

    # --- eviction

    def set_capacity(self, slot: int, chars: int) -> None:
        """0 = unlimited. Evicts what no longer fits before it returns, in slices; pinned blocks stay."""
        self.put_capacity(slot, chars)
        while chars and self.evict(slot, chars):
            pass

    def evict(self, slot: int, to_chars: int, budget_us: int = SLICE_US) -> int:
        """Drops a worker's least recently used leaves until it has at most `to_chars`: one slice of `budget_us` CPU.

        Returns the number of blocks dropped; call again until that is 0. The lock is let go every 128 blocks.
        """
        return self.shrink(slot, to_chars, budget_us)[0]

    def evict_to(self, max_chars: int, slice_us: int = SLICE_US, *, unless_known: bool = False) -> Iterator[int]:
        """Background eviction, a slice of at most `slice_us` CPU per step: stop iterating, and it ends at once.

        Finishes what was begun to be forgotten, brings every worker to its capacity and to `max_chars` (0 = no such
        limit; `unless_known`: only where there is no capacity), then frees a sixteenth of the pools. Yields blocks
        dropped in the slice.
        """
        totals = self.totals()
        for slot in range(totals["slots"]):
            while self.is_forgetting(slot):
                before = self.blocks(slot)
                self.forget_more(slot, slice_us)
                yield before - self.blocks(slot)
            capacity = self.capacity(slot)
            limits = [limit for limit in (capacity, 0 if unless_known and capacity else max_chars) if limit]
            while limits and self.size(slot) > min(limits):
                dropped = self.evict(slot, min(limits), slice_us)
                yield dropped
                if not dropped:  # pinned, or the lock is busy: the next round's work
                    break
        while True:
            dropped, is_more = self.make_room(
                totals["block_count"] // FREE_SHARE, totals["holding_count"] // FREE_SHARE, slice_us
            )
            if dropped:
                yield dropped
            if not is_more:
                return

    def remove_worker(self, slot: int) -> None:
        """Forgets all that a worker held when this was called, and voids its pins; in slices.

        Nothing of it is matched from the first moment on. What is inserted meanwhile stays.
        """
        for _ in self.forget(slot):
            pass

    def forget(self, slot: int, slice_us: int = SLICE_US) -> Iterator[None]:
        """`remove_worker`, a slice per step. Left off early, `evict_to` finishes it."""
        while not self.forget_begin(slot):
            yield
        while not self.forget_more(slot, slice_us):
            yield

    def smallest_tenant(self, slots: Iterable[int]) -> int:
        """The slot with the fewest characters, the first of equals; -1 when there is none to choose from."""
        return self.smallest(slots)
