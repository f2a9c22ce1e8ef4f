"""The prefix index: which worker is believed to hold how much of a prompt. Native, in shared memory, for all processes.

What it stands for
    An approximate radix tree over prompts (the SGLang router's), kept as chained hashes: `hash_i` covers block i and all
    before it, so equal hashes mean equal prefixes and a lookup needs no walk down a tree. The rest behind the last full
    block, or a prompt shorter than a block, is an entry of its own, hashed with its size: an exact repeat matches
    completely. Sizes are *characters*: bytes of UTF-8 text, or what the caller says that a block id stands for.
    Only hashes are kept. The hash is keyed (prefix_hash.h) with a seed drawn at creation.

Layout (prefix_layout.py; records in prefix_core.h)
    block      hash -> mask of the worker slots that hold it, characters, parent. One entry serves all workers.
    holding    one (block, worker) pair: parent holding, number of children, pins, place in the worker's order of use.
    slot row   per worker: characters, blocks, pinned characters, capacity, both ends of its order of use.
    pin        one request in flight: points at the deepest block that the request holds on its worker.
    Records live in fixed pools and never move, so links are indices that stay good, and nothing points outside the
    segment. Blocks are found by an open-addressed table of (32 bits of hash, index), at most half full; a removal
    shifts back what stands behind it. Holdings are found by buckets whose place follows the block's place in its pool:
    neighbours in a prompt are neighbours in memory. A full pool evicts.

One property carries the rest: *a worker that holds a block holds all before it*, since inserts run from the head and
evictions take leaves. Hence
    - along a prompt each worker's mask bit is set up to a depth and clear behind it. `match` compares masks at the ends
      of a stretch and halves it only where they differ: O(distinct depths x log n) lookups tell every worker's depth;
    - an insert touches the blocks that the worker gains, and of the others only the deepest;
    - pinning the deepest block keeps the whole prefix.

Order of eviction
    Per worker a list from cold to hot of leaves, and of whatever was the end of a use; a use moves one entry to the hot
    end. When the last child of a block goes, the block takes the child's place at the cold end, unless it has a place
    of its own. That is exactly "least recent use of the chain first, leaves first", with one list operation per use
    instead of one per block. What is found at the cold end and is no leaf, or pinned, leaves the list until it is a
    leaf again or unpinned. When a pool is full, batches of 64 come from the worker whose coldest entry is oldest: there
    the order over *all* workers may lag by a batch.

Pins
    pins of a holding = pin records that point at it + its children that are pinned, so pinned characters are counted
    once however many requests share them. A token names record and nonce; it is void after `remove_worker`, or when the
    shard's pins were reclaimed.

Locking
    One robust process-shared mutex with a deadline (2 ms). Not striped: a 32 KB prompt holds it for 2 us (4 us when it
    must evict), choose-and-book must see all workers at once anyway, and hashing, half of the work, is done before
    (scripts/bench/prefix_index.py --processes 2 shows what contention costs). Long work (eviction, forgetting, dump)
    takes it for bursts. A method takes the mutex itself unless `lock()` was called before. When the deadline passes the
    answer says so (-1, None, 0) and the caller decides without; an `unpin` that could not be done is done with the next
    lock that this process gets.

Crash recovery
    A process may be killed at any instruction. Every operation is a sequence of steps, each of which leads from one
    consistent state to the next (some blocks more held, a block less, a pin some blocks further). A step notes old words
    in an undo journal before it overwrites them, and ends by emptying it. Whoever then gets EOWNERDEAD writes the old
    words back, newest first: the dead process' last step never happened and all counts are exact, without a rebuild.
    Compiler barriers are enough: what a killed process stored in program order becomes visible, the rest never does.
    An interrupted insert leaves a shorter prefix; an interrupted pin or unpin leaves the record on an ancestor, which
    `reclaim_shard` gives back. A recovery that is killed itself is done again by the next. A journal that makes no sense
    (somebody wrote into the segment) empties the index; that is counted. The tests kill a process at every journalled
    store of every operation (`abort_at`) and recount everything (`check`).
"""
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy

from pointsman.daemon.shm.spans cimport JSON_ESCAPED, JSON_IDS, JSON_TEXT, Spans, json_span

from pointsman.daemon.shm import prefix_layout as _layout

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *when)
    int CLOCK_THREAD_CPUTIME_ID

cdef extern from "<errno.h>" nogil:
    int EBUSY, ETIMEDOUT

cdef enum:
    KIND_TEXT = 0
    KIND_IDS = 1
    BURST = 128  # evictions per hold of the mutex: some 15 us

if (
    sizeof(px_header) > _layout.HEADER_BYTES
    or (sizeof(px_slot), sizeof(px_block), sizeof(px_holding), sizeof(px_pin))
    != (_layout.SLOT_BYTES, _layout.BLOCK_BYTES, _layout.HOLDING_BYTES, _layout.PIN_BYTES)
):
    raise ImportError("prefix_layout.py and prefix_core.h do not agree on the records")

json_choose_width(True)


cdef inline int64_t thread_cpu_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return now.tv_sec * 1000000 + now.tv_nsec // 1000


cdef class HashChain:
    """A prompt as the index sees it: the chained hashes of its blocks. A buffer to be filled again and again.

    Made by `RawIndex.chain()`, whose seed and block size it uses. `len()` is the number of blocks.
    """

    def __cinit__(self, uint64_t seed, uint64_t block_bytes):
        px_key_init(&self.key, seed)
        self.block_bytes = self.block_chars = block_bytes
        self.partial = <unsigned char *> PyMem_Malloc(block_bytes)
        if self.partial == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.partial)
        PyMem_Free(self.hashes)

    def __len__(self):
        return self.n

    cdef void describe(self, px_chain_view *whole) noexcept:
        whole.hashes, whole.n = self.hashes, self.n
        whole.block_chars, whole.total = self.block_chars, self.total_chars

    cdef int _reserve(self, uint64_t n) except -1:
        cdef uint64_t room
        cdef void *grown
        if n > self.room:
            room = max(n, 2 * self.room, <uint64_t> 64)
            grown = PyMem_Realloc(self.hashes, room * sizeof(uint64_t))
            if grown == NULL:
                raise MemoryError
            self.hashes = <uint64_t *> grown
            self.room = room
        return 0

    cdef uint64_t _start(self, salt, uint64_t kind) except? 0:
        cdef bytes encoded = salt.encode() if isinstance(salt, str) else salt
        return px_start(&self.key, <const unsigned char *> <char *> encoded, len(encoded), kind)

    def load(self, text, salt=b""):
        """`text`: bytes-like. `salt` (model, LoRA; bytes or str) keeps equal texts apart. Returns self."""
        cdef Py_buffer view
        cdef uint64_t previous = self._start(salt, KIND_TEXT), size, at = 0
        cdef const unsigned char *p
        PyObject_GetBuffer(text, &view, PyBUF_SIMPLE)
        try:
            size = view.len
            self.n = self.total_chars = 0
            self.block_chars = self.block_bytes
            self._reserve((size + self.block_bytes - 1) // self.block_bytes)
            p = <const unsigned char *> view.buf
            self._text(previous, p, size)
        finally:
            PyBuffer_Release(&view)
        self.total_chars = size
        return self

    cdef uint64_t _text(self, uint64_t previous, const unsigned char *p, uint64_t size) noexcept:
        """Appends `size` bytes; only the last call may have a part of a block. Room was reserved."""
        cdef uint64_t part
        while size:
            part = min(size, self.block_bytes)
            previous = px_next_text(&self.key, previous, p, part)
            self.hashes[self.n] = previous
            self.n += 1
            p += part
            size -= part
        return previous

    def load_spans(self, spans, salt=b""):
        """Like `load` of the concatenation of `spans` (bytes-likes, or Spans), without making it. Returns self."""
        self._load(spans, salt, False)
        return self

    def load_json(self, spans, salt=b""):
        """Like `load_spans`, for JSON as it stands in a body: of a string token its text, of anything else its bytes.

        The escapes of strings are resolved, so that the same text is the same chain however a client wrote it. Spans
        must be valid JSON; what is not a string is stable as far as its writer is.
        """
        self._load(spans, salt, True)
        return self

    cdef int _load(self, spans, salt, bint is_json) except -1:
        cdef Py_buffer view
        cdef const unsigned char *p
        self._begin(salt)
        if type(spans) is Spans:
            self._feed_spans(spans, is_json)
        else:
            for span in spans:
                PyObject_GetBuffer(span, &view, PyBUF_SIMPLE)
                try:
                    p = <const unsigned char *> view.buf
                    if is_json and view.len >= 2 and p[0] == c'"':
                        self._feed_string(p + 1, view.len - 2)
                    else:
                        self._feed(p, view.len)
                finally:
                    PyBuffer_Release(&view)
        return self._finish()

    cdef int _begin(self, salt) except -1:
        self.previous = self._start(salt, KIND_TEXT)
        self.n = self.total_chars = self.filled = 0
        self.block_chars = self.block_bytes
        return 0

    cdef int _feed(self, const unsigned char *p, uint64_t size) except -1:
        """Appends text; what makes no whole block yet waits in `partial`."""
        cdef uint64_t part, whole
        self.total_chars += size
        self._reserve((self.total_chars + self.block_bytes - 1) // self.block_bytes)
        if self.filled:
            part = min(size, self.block_bytes - self.filled)
            memcpy(self.partial + self.filled, p, part)
            self.filled += part
            p += part
            size -= part
            if self.filled == self.block_bytes:
                self.previous = self._text(self.previous, self.partial, self.filled)
                self.filled = 0
        whole = size - size % self.block_bytes
        self.previous = self._text(self.previous, p, whole)
        if size > whole:
            memcpy(self.partial, p + whole, size - whole)
            self.filled = size - whole
        return 0

    cdef int _feed_spans(self, Spans spans, bint is_json) except -1:
        """`is_json`: as `load_json` does."""
        cdef const unsigned char *body = <const unsigned char *> PyBytes_AS_STRING(spans.body)
        cdef size_t i
        cdef json_span span
        for i in range(spans.n):
            span = spans.span[i]
            if span.kind == JSON_IDS:
                self._feed(<const unsigned char *> PyBytes_AS_STRING(spans.ids) + span.at, span.size)
            elif is_json and span.kind == JSON_TEXT:
                self._feed(body + span.at + 1, span.size - 2)
            elif is_json and span.kind == JSON_ESCAPED:
                self._feed_escaped(body + span.at + 1, span.size - 2)
            else:
                self._feed(body + span.at, span.size)
        return 0

    cdef int _feed_string(self, const unsigned char *p, uint64_t size) except -1:
        """The inside of a JSON string; without escapes it is fed from where it stands."""
        if memchr(p, c'\\', size) == NULL:
            return self._feed(p, size)
        return self._feed_escaped(p, size)

    cdef int _feed_escaped(self, const unsigned char *p, uint64_t size) except -1:
        cdef unsigned char text[4096]
        cdef const unsigned char *end = p + size
        while p < end:
            size = px_unescape(&p, end, text, sizeof(text))
            self._feed(text, size)
        return 0

    cdef int _finish(self) except -1:
        if self.filled:
            self._text(self.previous, self.partial, self.filled)
            self.filled = 0
        return 0

    def load_ids(self, ids, uint64_t block_chars, uint64_t total_chars, salt=b""):
        """A prompt given as 64-bit block ids (a sequence of ints, or a buffer of 8-byte items), prefix-chained or not.

        Each stands for `block_chars` characters, the last for what remains of `total_chars`; ids beyond it are left out.
        Raises ValueError when there are fewer ids than `total_chars` needs, or `block_chars` is not 1 to 2^32 - 1.
        """
        cdef Py_buffer view
        cdef uint64_t previous = self._start(salt, KIND_IDS), n, i, item
        cdef const uint64_t *p
        if not 1 <= block_chars < PX_NONE:
            raise ValueError("block_chars must be 1 to 2^32 - 1")
        n = total_chars // block_chars + (total_chars % block_chars != 0)
        self.n = self.total_chars = 0
        if PyObject_CheckBuffer(ids):
            PyObject_GetBuffer(ids, &view, PyBUF_SIMPLE)
            try:
                if view.itemsize != 8 and view.len % 8:
                    raise ValueError("a buffer of ids has items of 8 bytes")
                if <uint64_t> view.len // 8 < n:
                    raise ValueError("fewer block ids than total_chars needs")
                self._reserve(n)
                p = <const uint64_t *> view.buf
                for i in range(n):
                    previous = px_next_id(&self.key, previous, p[i], min(block_chars, total_chars - i * block_chars))
                    self.hashes[i] = previous
            finally:
                PyBuffer_Release(&view)
        else:
            if <uint64_t> len(ids) < n:
                raise ValueError("fewer block ids than total_chars needs")
            self._reserve(n)
            for i in range(n):
                item = <uint64_t> (ids[i] & 0xFFFFFFFFFFFFFFFF)
                previous = px_next_id(&self.key, previous, item, min(block_chars, total_chars - i * block_chars))
                self.hashes[i] = previous
        self.n = n
        self.block_chars = block_chars
        self.total_chars = total_chars
        return self

    def head(self, uint64_t chars) -> int:
        """The hash of the first `chars` characters, in whole blocks, at least one; 0 for an empty prompt."""
        return self._head(chars)

    cdef uint64_t _head(self, uint64_t chars) noexcept:
        """The hash of the first `chars` characters, in whole blocks, at least one: who shares it shares that much.

        0 for an empty prompt.
        """
        if not self.n:
            return 0
        return self.hashes[min(max(chars // self.block_chars, <uint64_t> 1), self.n) - 1]

    def hash_list(self) -> list:
        """The hashes as ints: for traces, tests and explanations, not for the request path."""
        return [self.hashes[i] for i in range(self.n)]


cdef class RawIndex:
    """The operations on one mapping of the segment; `PrefixIndex` is its public face. Not for threads.

    `buffer`: writable, of the layout's size. With `layout` (a PrefixLayout), `seed` and `block_bytes` it is made anew,
    else it must be an index of this version: ValueError says what it is not.
    """

    def __cinit__(self, buffer, layout=None, uint64_t seed=0, uint64_t block_bytes=512):
        cdef int code
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.attached = True
        self.deferred = []
        self.ix.base = <unsigned char *> self.view.buf
        self.ix.head = <px_header *> self.view.buf
        if self.view.len < _layout.HEADER_BYTES or (layout is not None and self.view.len < layout.size_bytes):
            raise ValueError("the segment is too small for a prefix index")
        cdef px_header *head = self.ix.head
        if layout is not None:
            self._describe(layout, seed, block_bytes)
        elif (head.magic, head.version) != (_layout.MAGIC, _layout.VERSION):
            raise ValueError(f"the segment is no prefix index of version {_layout.VERSION}")
        elif not self._is_sound():
            raise ValueError("the header of the prefix index does not fit its segment")
        self.ix.slots = <px_slot *> (self.ix.base + head.off_slots)
        self.ix.table = <uint64_t *> (self.ix.base + head.off_table)
        self.ix.holding_heads = <uint32_t *> (self.ix.base + head.off_holding_heads)
        self.ix.blocks = <px_block *> (self.ix.base + head.off_blocks)
        self.ix.holdings = <px_holding *> (self.ix.base + head.off_holdings)
        self.ix.pins = <px_pin *> (self.ix.base + head.off_pins)
        self.ix.expected = self.ix.near = self.ix.far = PX_NONE
        self.ix.table_mask = head.table_size - 1
        self.ix.holding_mask = head.holding_buckets - 1
        if layout is not None:
            px_clear(&self.ix)
            code = px_mutex_init(&self.ix)
            if code:
                raise OSError(code, "pthread_mutex_init")
            head.magic = _layout.MAGIC

    cdef _describe(self, layout, uint64_t seed, uint64_t block_bytes):
        cdef px_header *head = self.ix.head
        head.version, head.size = _layout.VERSION, layout.size_bytes
        head.block_bytes, head.seed, head.slots = block_bytes, seed, layout.slots
        head.block_count, head.holding_count, head.pin_count = layout.blocks, layout.holdings, layout.pins
        head.table_size, head.holding_buckets = layout.table_size, layout.holding_buckets
        head.off_slots = layout.off_slots
        head.off_table, head.off_holding_heads = layout.off_table, layout.off_holding_heads
        head.off_blocks, head.off_holdings, head.off_pins = layout.off_blocks, layout.off_holdings, layout.off_pins

    cdef bint _is_sound(self) except -1:
        cdef px_header *head = self.ix.head
        try:
            layout = _layout.PrefixLayout(head.slots, head.block_count, head.holding_count, head.pin_count)
        except ValueError:
            return False
        return (
            layout.size_bytes == head.size
            and head.size <= <uint64_t> self.view.len
            and (layout.table_size, layout.holding_buckets) == (head.table_size, head.holding_buckets)
            and (layout.off_slots, layout.off_blocks, layout.off_holdings, layout.off_pins)
            == (head.off_slots, head.off_blocks, head.off_holdings, head.off_pins)
            and (layout.off_table, layout.off_holding_heads) == (head.off_table, head.off_holding_heads)
            and _layout.MIN_BLOCK_CHARS <= head.block_bytes <= _layout.MAX_BLOCK_CHARS
        )

    def __dealloc__(self):
        PyMem_Free(self.path)
        if self.attached:
            PyBuffer_Release(&self.view)

    cdef int _slot(self, int64_t slot) except -1:
        if not 0 <= slot < <int64_t> self.ix.head.slots:
            raise IndexError(f"no worker slot {slot}")
        return 0

    # --- the mutex

    cdef int _acquire(self, int64_t deadline_us) except -1:
        """1 = held, 0 = the deadline passed."""
        cdef int code = px_try_lock(&self.ix)
        if code == EBUSY:
            with nogil:
                code = px_wait_lock(&self.ix, deadline_us)
        if code:
            code = px_settle_lock(&self.ix, code)
            if code == ETIMEDOUT:
                return 0
            if code:
                raise OSError(code, "the prefix index' mutex")
        if self.deferred:
            for token in self.deferred:
                px_unpin(&self.ix, token)
            self.deferred.clear()
        return 1

    cdef int _enter(self, int64_t deadline_us=2000) except -1:
        return 1 if self.held else self._acquire(deadline_us)

    cdef void _leave(self) noexcept:
        if not self.held:
            px_unlock(&self.ix)

    def lock(self, int64_t deadline_us=2000) -> bool:
        """Take the mutex for several calls. False when `deadline_us` passed: decide without the index."""
        if self.held:
            raise RuntimeError("the prefix index is locked already by this process")
        self.held = self._acquire(deadline_us)
        return self.held

    def unlock(self):
        self._unlock()

    cdef int _unlock(self) except -1:
        if not self.held:
            raise RuntimeError("the prefix index is not locked by this process")
        self.held = False
        px_unlock(&self.ix)
        return 0

    # --- the request path

    def chain(self) -> HashChain:
        """An empty chain with this index' seed and block size."""
        return HashChain(self.ix.head.seed, self.ix.head.block_bytes)

    def match(self, HashChain chain not None, out):
        """Fills `out` (writable, 8 bytes per slot, native unsigned) with the characters that every worker holds.

        Renews nothing. Returns the largest, -1 when the lock was not got (`out` is as it was).
        """
        cdef Py_buffer view
        cdef px_chain_view whole
        cdef uint64_t best
        chain.describe(&whole)
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            if view.len < <int64_t> (self.ix.head.slots * sizeof(uint64_t)):
                raise ValueError("the buffer has less than 8 bytes per worker slot")
            if not self._enter():
                return -1
            best = px_match(&self.ix, &whole, <uint64_t *> view.buf)
            self._leave()
            return best
        finally:
            PyBuffer_Release(&view)

    def insert(self, int64_t slot, HashChain chain not None):
        """The worker holds `chain`, used just now; evicts what no longer fits. Never ends above the capacity.

        Returns the characters of it that are held now (the head, when not all fits), -1 when the lock was not got.
        """
        cdef px_chain_view whole
        cdef uint32_t deepest
        cdef uint64_t held
        self._slot(slot)
        chain.describe(&whole)
        if not self._enter():
            return -1
        held = px_insert(&self.ix, <uint32_t> slot, &whole, False, &deepest)
        px_settle(&self.ix, <uint32_t> slot)
        self._leave()
        return min(held * chain.block_chars, chain.total_chars)

    def match_and_insert(self, HashChain chain not None, int64_t slot, out):
        """`match`, then `insert`, in one hold of the lock; returns what `match` does."""
        cdef Py_buffer view
        cdef px_chain_view whole
        cdef uint32_t deepest
        cdef uint64_t best
        self._slot(slot)
        chain.describe(&whole)
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            if view.len < <int64_t> (self.ix.head.slots * sizeof(uint64_t)):
                raise ValueError("the buffer has less than 8 bytes per worker slot")
            if not self._enter():
                return -1
            best = px_match(&self.ix, &whole, <uint64_t *> view.buf)
            px_insert(&self.ix, <uint32_t> slot, &whole, False, &deepest)
            px_settle(&self.ix, <uint32_t> slot)
            self._leave()
            return best
        finally:
            PyBuffer_Release(&view)

    def pin(self, int64_t slot, HashChain chain not None, int64_t shard=0, bint may_exceed=False):
        """`insert`, and nothing of it is evicted until `unpin(token)`. Returns the token.

        0: nothing was pinned (an empty prompt, no room, no pin record left, no lock). With `may_exceed` blocks of
        requests in flight may take a worker above its capacity, as an engine's queue does; else what does
        not fit is left out.
        """
        if not 0 <= shard <= 0xFFFF:
            raise IndexError(f"no shard {shard}")
        return self._pin(slot, chain, shard, may_exceed)

    cdef uint64_t _pin(self, int64_t slot, HashChain chain, int64_t shard, bint may_exceed) except? 1:
        cdef px_chain_view whole
        cdef uint32_t deepest
        cdef uint64_t token = 0
        cdef void *grown
        self._slot(slot)
        if chain.n > self.path_room:
            grown = PyMem_Realloc(self.path, chain.n * sizeof(uint32_t))
            if grown == NULL:
                raise MemoryError
            self.path = <uint32_t *> grown
            self.path_room = chain.n
        chain.describe(&whole)
        if not self._enter():
            return 0
        px_insert(&self.ix, <uint32_t> slot, &whole, may_exceed, &deepest)
        if deepest != PX_NONE:
            token = px_pin_path(&self.ix, deepest, <uint32_t> shard, self.path)
        px_settle(&self.ix, <uint32_t> slot)
        self._leave()
        return token

    cdef void _expect(self, HashChain chain) noexcept:
        """Before the mutex is taken: `chain` is going to be matched."""
        cdef px_chain_view whole
        chain.describe(&whole)
        px_expect(&self.ix, &whole)

    cdef void _match_into(self, HashChain chain, uint64_t *out) noexcept:
        """The mutex is held."""
        cdef px_chain_view whole
        chain.describe(&whole)
        px_match(&self.ix, &whole, out)

    cdef void _insert_into(self, int64_t slot, HashChain chain) noexcept:
        """The mutex is held, the slot is one of ours."""
        cdef px_chain_view whole
        cdef uint32_t deepest
        chain.describe(&whole)
        px_insert(&self.ix, <uint32_t> slot, &whole, False, &deepest)
        px_settle(&self.ix, <uint32_t> slot)

    def unpin(self, uint64_t token):
        """Renews the blocks and lets them go. False for a void token; None when it is put off for want of the lock."""
        return self._unpin(token)

    cdef object _unpin(self, uint64_t token):
        cdef int done
        if not token:
            return False
        if not self._enter():
            self.deferred.append(token)
            return None
        done = px_unpin(&self.ix, token)
        self._leave()
        return bool(done)

    def withdraw(self, uint64_t token, uint64_t keep=0):
        """`unpin` for a request that was never computed: behind its first `keep` characters its blocks are dropped.

        Blocks that others have pinned or continued stay. Returns what `unpin` does; when put off, it is an `unpin`.
        """
        return self._withdraw(token, keep)

    cdef object _withdraw(self, uint64_t token, uint64_t keep):
        cdef int done
        if not token:
            return False
        if not self._enter():
            self.deferred.append(token)
            return None
        done = px_withdraw(&self.ix, token, keep)
        self._leave()
        return bool(done)

    def settle(self):
        """Does what was put off for want of the lock, if it can be had now."""
        if self.deferred and self._enter():
            self._leave()

    # --- per worker

    def size(self, int64_t slot):
        """Characters held. Like the next ones a single word, read without the lock."""
        self._slot(slot)
        return self.ix.slots[slot].chars

    def blocks(self, int64_t slot):
        self._slot(slot)
        return self.ix.slots[slot].blocks

    def pinned(self, int64_t slot):
        """Characters that requests in flight hold, shared blocks once."""
        self._slot(slot)
        return self.ix.slots[slot].pinned

    def capacity(self, int64_t slot):
        """Characters, 0 = unlimited."""
        self._slot(slot)
        return self.ix.slots[slot].capacity

    def is_forgetting(self, int64_t slot):
        self._slot(slot)
        return self.ix.slots[slot].forgetting != 0

    def put_capacity(self, int64_t slot, uint64_t chars):
        """Only the number; `shrink` does the work. A single word, no lock."""
        self._slot(slot)
        self.ix.slots[slot].capacity = chars

    def sizes(self, out):
        """The characters of every slot, into a buffer of 8 bytes per slot."""
        cdef Py_buffer view
        cdef uint64_t i
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            if view.len < <int64_t> (self.ix.head.slots * sizeof(uint64_t)):
                raise ValueError("the buffer has less than 8 bytes per worker slot")
            for i in range(self.ix.head.slots):
                (<uint64_t *> view.buf)[i] = self.ix.slots[i].chars
        finally:
            PyBuffer_Release(&view)

    def pinned_sizes(self, out):
        """The pinned characters of every slot, into a buffer of 8 bytes per slot."""
        cdef Py_buffer view
        cdef uint64_t i
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            if view.len < <int64_t> (self.ix.head.slots * sizeof(uint64_t)):
                raise ValueError("the buffer has less than 8 bytes per worker slot")
            for i in range(self.ix.head.slots):
                (<uint64_t *> view.buf)[i] = self.ix.slots[i].pinned
        finally:
            PyBuffer_Release(&view)

    def smallest(self, slots):
        """Of an iterable of slots the one with the fewest characters, the first of equals; -1 of none."""
        cdef int64_t slot, found = -1
        for slot in slots:
            self._slot(slot)
            if found < 0 or self.ix.slots[slot].chars < self.ix.slots[found].chars:
                found = slot
        return found

    # --- long work, in bursts

    def shrink(self, int64_t slot, uint64_t to_chars, int64_t budget_us, int64_t most=-1):
        """Evicts from one worker. Returns (blocks dropped, whether there may be more to do)."""
        cdef uint64_t dropped, sum = 0, left = PX_ALL if most < 0 else <uint64_t> most
        cdef int64_t until = thread_cpu_us() + budget_us
        self._slot(slot)
        while True:
            if not self._enter():
                return sum, True
            dropped = px_shrink(&self.ix, <uint32_t> slot, to_chars, min(left, <uint64_t> BURST), PX_NONE)
            self._leave()
            sum += dropped
            left -= dropped
            if not left or dropped < BURST:
                return sum, not left
            if thread_cpu_us() >= until:
                return sum, True

    def make_room(self, uint64_t blocks, uint64_t holdings, int64_t budget_us):
        """Evicts the oldest of all workers until so much of the pools is free. Returns like `shrink`."""
        cdef uint64_t dropped, sum = 0
        cdef int64_t until = thread_cpu_us() + budget_us
        while True:
            if not self._enter():
                return sum, True
            dropped = px_make_room(&self.ix, blocks, holdings, BURST, PX_NONE)
            self._leave()
            sum += dropped
            if dropped < BURST:
                return sum, False
            if thread_cpu_us() >= until:
                return sum, True

    def forget_begin(self, int64_t slot):
        """False when the lock was not got."""
        self._slot(slot)
        if not self._enter(50000):
            return False
        px_forget_begin(&self.ix, <uint32_t> slot)
        self._leave()
        return True

    def forget_more(self, int64_t slot, int64_t budget_us):
        """True when nothing is left to forget."""
        cdef int done
        cdef int64_t until = thread_cpu_us() + budget_us
        self._slot(slot)
        while True:
            if not self._enter():
                return False
            done = px_forget_slice(&self.ix, <uint32_t> slot, BURST)
            self._leave()
            if done or thread_cpu_us() >= until:
                return bool(done)

    def reclaim_shard(self, int64_t shard):
        """Gives back the pins of a dead shard; returns how many, or -1 when the lock was not got for all (call again)."""
        cdef uint64_t cursor = 0, sum = 0
        while cursor < self.ix.head.pin_count:
            if not self._enter(50000):
                return -1
            sum += px_void_pins(&self.ix, shard, -1, &cursor, BURST)
            self._leave()
        return sum

    # --- looking at it

    def check(self):
        """Recounts everything; a list of the violations, empty when all is well. Holds the mutex all the while."""
        cdef bytearray text = bytearray(1 << 16)
        cdef char *p = text
        cdef int count
        if not self._enter(1000000):
            raise TimeoutError("the prefix index stayed locked for 1 s")
        try:
            count = px_check(&self.ix, p, 1 << 16)
        finally:
            self._leave()
        lines = bytes(text).split(b"\0", 1)[0].decode().splitlines()
        return lines if len(lines) == count else [*lines, f"{count} violations in all"]

    def totals(self):
        """Gauges and counters of the whole index, by name."""
        cdef px_header *head = self.ix.head
        return {
            "size_bytes": head.size, "slots": head.slots, "block_bytes": head.block_bytes, "seed": head.seed,
            "block_count": head.block_count, "holding_count": head.holding_count, "pin_count": head.pin_count,
            "clock": head.clock, "blocks_used": head.blocks_used, "holdings_used": head.holdings_used, "pins_used": head.pins_used,
            "evictions": head.evictions, "memory_evictions": head.memory_evictions, "truncations": head.truncations,
            "pin_failures": head.pin_failures, "dropped_pins": head.dropped_pins,
            "lock_timeouts": head.lock_timeouts, "recoveries": head.recoveries, "resets": head.resets,
        }

    def held_blocks(self, int64_t slot):
        """The hashes that a worker holds, in no order: for tests."""
        cdef uint64_t i
        self._slot(slot)
        return {
            self.ix.blocks[self.ix.holdings[i].block].hash
            for i in range(self.ix.head.holding_count)
            if self.ix.holdings[i].slot == slot
        }


def abort_at(uint64_t step):
    """Kill tests: SIGKILL for this process at its `step`-th journalled store or commit from now on; 0 = never."""
    global px_abort_countdown
    px_abort_countdown = step


def use_wide(bint is_allowed):
    """Tests: whether escapes may be resolved the wide way from now on (json_string.h)."""
    json_choose_width(is_allowed)
