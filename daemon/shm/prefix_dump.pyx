"""What the prefix index holds, as records that outlive it: written and read in slices while others use the index.

Records. 64-bit words in the machine's byte order. A record is a path of one worker's blocks, from the head of a prompt
towards its end:

    slot | has_anchor << 16 | n << 32
    hash of the block before the first      the anchor: an earlier record has it; 0 without one
    stamp of the last block                 of the order of use, comparable within one dump
    characters of the last | of each other << 32
    n hashes

Every leaf of a worker's tree ends one record, which begins behind the first block that an earlier record has, so each
block is told once per worker: 8 bytes, and 32 per record. A block that is no leaf, yet has a place of its own in the
order of use, has a record without blocks: it is the anchor. No pins, no capacities.

A dump goes through the pool of holdings and climbs from every leaf. A slice holds the mutex for its budget at most,
also in the middle of a climb: what was climbed so far is good as long as the topmost block is still held, because a
worker that holds a block holds all before it, and the hash of a block says what all before it are. What changes between
two slices may be in the dump or not, but no record says what never was.

A load adds records in their order, sorts the uses by their stamps (`sort` touches no shared memory, so it may run in
a thread), and renews what was used in that order. It believes nothing that could harm the memory: `tests/…/test_prefix_dump.py`
feeds it nonsense. Capacities are not looked at; the next eviction does.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport qsort

from pointsman.daemon.shm.prefix cimport (
    PX_FREE,
    PX_NONE,
    RawIndex,
    px_add,
    px_block,
    px_find_block,
    px_find_holding,
    px_holding,
    px_index,
    px_renew,
)

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *when)
    int CLOCK_MONOTONIC

cdef enum:
    HEAD_WORDS = 4
    STEPS = 64  # between two looks at the clock: some 5 us
    LOCK_US = 50000

cdef struct Use:
    uint64_t stamp, hash, slot


cdef inline int64_t now_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000000 + now.tv_nsec // 1000


cdef int compare_stamps(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const Use *> one).stamp, b = (<const Use *> other).stamp
    return (a > b) - (a < b)


cdef class WordList:
    """A growing array of words."""

    cdef uint64_t *word
    cdef uint64_t n, room

    def __dealloc__(self):
        PyMem_Free(self.word)

    cdef int reserve(self, uint64_t more) except -1:
        cdef uint64_t room
        cdef void *grown
        if self.n + more > self.room:
            room = max(self.n + more, 2 * self.room, <uint64_t> 4096)
            grown = PyMem_Realloc(self.word, room * sizeof(uint64_t))
            if grown == NULL:
                raise MemoryError
            self.word = <uint64_t *> grown
            self.room = room
        return 0


cdef class IndexDump:
    """One dump of `index`. `is_done` once all of it has been told."""

    cdef RawIndex index
    cdef uint64_t *seen
    cdef uint64_t next
    cdef WordList out, path
    cdef uint64_t slot, stamp, last_chars, chars, steps
    cdef uint32_t top
    cdef readonly bint is_done

    def __init__(self, RawIndex index not None):
        cdef uint64_t count = index.ix.head.holding_count
        self.index = index
        self.seen = <uint64_t *> PyMem_Calloc(count // 64 + 1, sizeof(uint64_t))
        if self.seen == NULL:
            raise MemoryError
        self.out, self.path = WordList(), WordList()

    def __dealloc__(self):
        PyMem_Free(self.seen)

    def more(self, int64_t budget_us) -> bytes:
        """The next records, perhaps none yet. Holds the mutex for about `budget_us`.

        Raises TimeoutError when the mutex is not to be had for 50 ms; another call may have more luck.
        """
        if self.is_done:
            return b""
        if not self.index._enter(LOCK_US):
            raise TimeoutError("the prefix index stayed locked")
        try:
            self._run(now_us() + budget_us)
        finally:
            self.index._leave()
        records = PyBytes_FromStringAndSize(<char *> self.out.word, self.out.n * sizeof(uint64_t))
        self.out.n = 0
        return records

    cdef int _run(self, int64_t until) except -1:
        cdef px_index *ix = &self.index.ix
        cdef px_holding *holding
        if self.path.n and not self._is_climb_good():
            self.path.n = 0
        while True:
            if self.path.n:
                if not self._climb(until):
                    return 0
            elif self.next >= ix.head.holding_count:
                self.is_done = True
                return 0
            else:
                holding = &ix.holdings[self.next]
                if holding.slot != PX_FREE and not ix.slots[holding.slot].forgetting:
                    if not holding.children:
                        self._begin(<uint32_t> self.next)
                    elif holding.listed:
                        self._tell_use(<uint32_t> self.next)
                self.next += 1
            if self._is_over(until):
                return 0

    cdef bint _is_over(self, int64_t until) noexcept:
        self.steps += 1
        return self.steps % STEPS == 0 and now_us() >= until

    cdef bint _is_climb_good(self) noexcept:
        cdef px_index *ix = &self.index.ix
        cdef px_holding *top = &ix.holdings[self.top]
        return top.slot == self.slot and ix.blocks[top.block].hash == self.path.word[self.path.n - 1]

    cdef bint _was_seen(self, uint32_t holding) noexcept:
        return self.seen[holding >> 6] >> (holding & 63) & 1

    cdef int _begin(self, uint32_t leaf) except -1:
        cdef px_index *ix = &self.index.ix
        if not self._was_seen(leaf):
            self.slot, self.stamp = ix.holdings[leaf].slot, ix.holdings[leaf].stamp
            self.last_chars, self.chars = ix.blocks[ix.holdings[leaf].block].chars, 0
            self._note(leaf)
        return 0

    cdef int _note(self, uint32_t holding) except -1:
        self.path.reserve(1)
        self.path.word[self.path.n] = self.index.ix.blocks[self.index.ix.holdings[holding].block].hash
        self.path.n += 1
        self.top = holding
        self.seen[holding >> 6] |= <uint64_t> 1 << (holding & 63)
        return 0

    cdef bint _climb(self, int64_t until) except -1:
        """Goes up from `top` until the record is whole: True; False when the time is over."""
        cdef px_index *ix = &self.index.ix
        cdef uint32_t parent = ix.holdings[self.top].parent
        while parent != PX_NONE and not self._was_seen(parent):
            self.chars = ix.blocks[ix.holdings[parent].block].chars
            self._note(parent)
            parent = ix.holdings[parent].parent
            if self._is_over(until):
                return False
        self._tell(parent)
        return True

    cdef int _tell_use(self, uint32_t inner) except -1:
        self.slot, self.stamp = self.index.ix.holdings[inner].slot, self.index.ix.holdings[inner].stamp
        self.last_chars = self.chars = 0
        return self._tell(inner)

    cdef int _tell(self, uint32_t anchor) except -1:
        cdef px_index *ix = &self.index.ix
        cdef uint64_t n = self.path.n, k
        cdef uint64_t *words
        self.out.reserve(HEAD_WORDS + n)
        words = self.out.word + self.out.n
        words[0] = self.slot | (<uint64_t> (anchor != PX_NONE)) << 16 | n << 32
        words[1] = 0 if anchor == PX_NONE else ix.blocks[ix.holdings[anchor].block].hash
        words[2] = self.stamp
        words[3] = self.last_chars | self.chars << 32
        for k in range(n):
            words[HEAD_WORDS + k] = self.path.word[n - 1 - k]
        self.out.n += HEAD_WORDS + n
        self.path.n = 0
        return 0


cdef class IndexLoad:
    """One load of `records` into `index`: `add` until it is done, `sort`, `renew` until it is done.

    `slot_of`: for every slot of the dump the one here, -1 to leave it out. `added`: blocks, so far. When the pools are
    full the rest is left out. Raises ValueError for records that cannot be a dump's; what was added by then is sound.
    """

    cdef RawIndex index
    cdef Py_buffer view
    cdef bint attached
    cdef list slot_of
    cdef const uint64_t *words
    cdef uint64_t size, at, within, use_count, use_room, renewed
    cdef Use *uses
    cdef readonly uint64_t added

    def __init__(self, RawIndex index not None, records, slot_of):
        self.index, self.slot_of = index, list(slot_of)
        for slot in self.slot_of:
            if slot >= 0:
                index._slot(slot)
        PyObject_GetBuffer(records, &self.view, PyBUF_SIMPLE)
        self.attached = True
        if self.view.len % 8:
            raise ValueError("the records are no whole words")
        self.words, self.size = <const uint64_t *> self.view.buf, self.view.len // 8

    def __dealloc__(self):
        PyMem_Free(self.uses)
        if self.attached:
            PyBuffer_Release(&self.view)

    def add(self, int64_t budget_us) -> bool:
        """Adds records for about `budget_us`; True when all are added. Raises ValueError, TimeoutError."""
        cdef int64_t until = now_us() + budget_us
        if not self.index._enter(LOCK_US):
            raise TimeoutError("the prefix index stayed locked")
        try:
            while self.at < self.size:
                if not self._add_record(until):
                    return False
                if now_us() >= until:
                    break
        finally:
            self.index._leave()
        return self.at >= self.size

    cdef bint _add_record(self, int64_t until) except -1:
        """False when the time is over in the middle of it."""
        cdef const uint64_t *words = self.words + self.at
        cdef uint64_t left = self.size - self.at, n, number
        cdef int64_t slot
        if left < HEAD_WORDS:
            raise ValueError("a record is cut off")
        n, number = words[0] >> 32, words[0] & 0xFFFF
        if n > left - HEAD_WORDS or number >= <uint64_t> len(self.slot_of):
            raise ValueError("a record does not fit")
        slot = self.slot_of[number]
        if slot >= 0 and not self._add_blocks(words, <uint32_t> slot, n, until):
            return False
        self.within = 0
        self.at += HEAD_WORDS + n
        return True

    cdef bint _add_blocks(self, const uint64_t *words, uint32_t slot, uint64_t n, int64_t until) except -1:
        cdef px_index *ix = &self.index.ix
        cdef uint32_t parent = PX_NONE, block, holding
        cdef uint64_t hash, chars, k = self.within
        if (k or words[0] >> 16 & 1) and n:
            parent = self._holding(words[HEAD_WORDS + k - 1] if k else words[1], slot)
            if parent == PX_NONE:
                return True  # its anchor was left out, or evicted while the dump was made
        while k < n:
            hash = words[HEAD_WORDS + k]
            chars = words[3] & 0xFFFFFFFF if k + 1 == n else words[3] >> 32
            if not 0 < chars < PX_NONE:
                raise ValueError("a block of an impossible size")
            block, holding = px_find_block(ix, hash), PX_NONE
            if block != PX_NONE:
                self._check_block(&ix.blocks[block], chars, parent)
                holding = px_find_holding(ix, block, slot)
            if holding == PX_NONE:
                if ix.head.blocks_used == ix.head.block_count or ix.head.holdings_used == ix.head.holding_count:
                    self.at = self.size
                    break
                holding = px_add(ix, slot, parent, hash, <uint32_t> chars, block != PX_NONE)
                self.added += 1
            parent = holding
            k += 1
            if k % STEPS == 0 and k < n and now_us() >= until:
                self.within = k
                return False
        if k or not n:
            self._note_use(words[2], slot, words[HEAD_WORDS + k - 1] if k else words[1])
        return True

    cdef uint32_t _holding(self, uint64_t hash, uint32_t slot) noexcept:
        cdef uint32_t block = px_find_block(&self.index.ix, hash)
        return PX_NONE if block == PX_NONE else px_find_holding(&self.index.ix, block, slot)

    cdef int _check_block(self, px_block *block, uint64_t chars, uint32_t parent) except -1:
        cdef uint32_t before = PX_NONE if parent == PX_NONE else self.index.ix.holdings[parent].block
        if block.chars != chars or block.parent != before:
            raise ValueError("a block contradicts the index")
        return 0

    cdef int _note_use(self, uint64_t stamp, uint32_t slot, uint64_t hash) except -1:
        cdef uint64_t room
        cdef void *grown
        if self.use_count == self.use_room:
            room = max(2 * self.use_room, <uint64_t> 1024)
            grown = PyMem_Realloc(self.uses, room * sizeof(Use))
            if grown == NULL:
                raise MemoryError
            self.uses, self.use_room = <Use *> grown, room
        self.uses[self.use_count] = Use(stamp, hash, slot)
        self.use_count += 1
        return 0

    def sort(self):
        """Puts the uses in their order."""
        if self.use_count:
            with nogil:
                qsort(self.uses, self.use_count, sizeof(Use), compare_stamps)

    def renew(self, int64_t budget_us) -> bool:
        """Makes the order of use that of the dump, for about `budget_us`; True when it is. Raises TimeoutError."""
        cdef int64_t until = now_us() + budget_us
        cdef uint32_t holding
        if not self.index._enter(LOCK_US):
            raise TimeoutError("the prefix index stayed locked")
        try:
            while self.renewed < self.use_count:
                holding = self._holding(self.uses[self.renewed].hash, <uint32_t> self.uses[self.renewed].slot)
                if holding != PX_NONE:
                    px_renew(&self.index.ix, holding)
                self.renewed += 1
                if self.renewed % STEPS == 0 and now_us() >= until:
                    break
        finally:
            self.index._leave()
        return self.renewed >= self.use_count
