"""What other extensions may use of the prefix index: see prefix.pyx."""
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from pointsman.daemon.shm.spans cimport Spans

cdef extern from "prefix_hash.h" nogil:
    ctypedef struct px_key:
        pass
    void px_key_init(px_key *key, uint64_t seed)
    uint64_t px_start(const px_key *key, const unsigned char *salt, size_t size, uint64_t kind)
    uint64_t px_next_text(const px_key *key, uint64_t previous, const unsigned char *p, size_t size)
    uint64_t px_next_id(const px_key *key, uint64_t previous, uint64_t id, uint64_t size)

cdef extern from "json_string.h" nogil:
    void json_choose_width(bint is_wide_allowed)

cdef extern from "json_escape.h" nogil:
    size_t px_unescape(const unsigned char **p, const unsigned char *end, unsigned char *out, size_t room)

cdef extern from "prefix_core.h" nogil:
    uint32_t PX_NONE
    uint16_t PX_FREE
    uint64_t PX_ALL
    uint64_t px_abort_countdown
    ctypedef struct px_block:
        uint64_t hash
        uint32_t chars, parent, holders
    ctypedef struct px_holding:
        uint32_t block, parent, next, children, pins
        uint16_t slot, listed
        uint64_t stamp
    ctypedef struct px_pin:
        pass
    ctypedef struct px_slot:
        uint64_t chars, blocks, pinned, pins, capacity, forgetting, evicted
        uint32_t cold, hot
    ctypedef struct px_header:
        uint64_t magic, version, size, block_bytes, seed, slots
        uint64_t block_count, holding_count, pin_count, table_size, holding_buckets
        uint64_t off_slots, off_table, off_holding_heads, off_blocks, off_holdings, off_pins
        uint64_t clock, blocks_used, holdings_used, pins_used
        uint64_t evictions, memory_evictions, truncations, pin_failures, lock_timeouts, recoveries, resets, dropped_pins
    ctypedef struct px_index:
        unsigned char *base
        px_header *head
        px_slot *slots
        uint64_t *table
        uint32_t *holding_heads
        px_block *blocks
        px_holding *holdings
        px_pin *pins
        uint64_t table_mask, holding_mask
        uint32_t expected, near, far
    ctypedef struct px_chain_view:
        const uint64_t *hashes
        uint64_t n, block_chars, total
    int px_mutex_init(px_index *ix)
    int px_try_lock(px_index *ix)
    int px_wait_lock(px_index *ix, int64_t deadline_us)
    int px_settle_lock(px_index *ix, int code)
    int px_unlock(px_index *ix)
    void px_clear(px_index *ix)
    uint32_t px_find_block(px_index *ix, uint64_t hash)
    uint32_t px_find_holding(px_index *ix, uint32_t block, uint32_t slot)
    uint64_t px_match(px_index *ix, const px_chain_view *chain, uint64_t *out)
    uint64_t px_insert(px_index *ix, uint32_t slot, const px_chain_view *chain, int may_exceed, uint32_t *deepest)
    uint64_t px_pin_path(px_index *ix, uint32_t target, uint32_t shard, uint32_t *path)
    int px_unpin(px_index *ix, uint64_t token)
    int px_withdraw(px_index *ix, uint64_t token, uint64_t keep)
    void px_renew(px_index *ix, uint32_t holding)
    void px_settle(px_index *ix, uint32_t slot)
    void px_expect(px_index *ix, const px_chain_view *chain)
    uint64_t px_void_pins(px_index *ix, int64_t shard, int64_t slot, uint64_t *cursor, uint64_t most)
    uint64_t px_shrink(px_index *ix, uint32_t slot, uint64_t to_chars, uint64_t most, uint32_t keep)
    uint64_t px_make_room(px_index *ix, uint64_t blocks, uint64_t holdings, uint64_t most, uint32_t keep)
    void px_forget_begin(px_index *ix, uint32_t slot)
    int px_forget_slice(px_index *ix, uint32_t slot, uint64_t most)
    uint32_t px_add(px_index *ix, uint32_t slot, uint32_t parent, uint64_t hash, uint32_t chars, int exists)

cdef extern from "prefix_check.h" nogil:
    int px_check(px_index *ix, char *text, size_t size)


cdef class HashChain:
    cdef px_key key
    cdef uint64_t *hashes
    cdef uint64_t n, room, block_bytes, previous, filled
    cdef readonly uint64_t block_chars, total_chars
    cdef unsigned char *partial

    cdef void describe(self, px_chain_view *whole) noexcept
    cdef int _reserve(self, uint64_t n) except -1
    cdef uint64_t _start(self, salt, uint64_t kind) except? 0
    cdef uint64_t _text(self, uint64_t previous, const unsigned char *p, uint64_t size) noexcept
    cdef int _load(self, spans, salt, bint is_json) except -1
    cdef int _begin(self, salt) except -1
    cdef int _feed(self, const unsigned char *p, uint64_t size) except -1
    cdef int _feed_spans(self, Spans spans, bint is_json) except -1
    cdef int _feed_escaped(self, const unsigned char *p, uint64_t size) except -1
    cdef int _feed_string(self, const unsigned char *p, uint64_t size) except -1
    cdef int _finish(self) except -1
    cdef uint64_t _head(self, uint64_t chars) noexcept


cdef class RawIndex:
    cdef Py_buffer view
    cdef px_index ix
    cdef bint attached
    cdef bint held
    cdef uint32_t *path
    cdef uint64_t path_room
    cdef list deferred

    cdef _describe(self, layout, uint64_t seed, uint64_t block_bytes)
    cdef bint _is_sound(self) except -1
    cdef int _slot(self, int64_t slot) except -1
    cdef int _acquire(self, int64_t deadline_us) except -1
    cdef int _enter(self, int64_t deadline_us=*) except -1
    cdef void _leave(self) noexcept
    cdef int _unlock(self) except -1
    cdef uint64_t _pin(self, int64_t slot, HashChain chain, int64_t shard, bint may_exceed) except? 1
    cdef void _expect(self, HashChain chain) noexcept
    cdef void _match_into(self, HashChain chain, uint64_t *out) noexcept
    cdef void _insert_into(self, int64_t slot, HashChain chain) noexcept
    cdef object _unpin(self, uint64_t token)
    cdef object _withdraw(self, uint64_t token, uint64_t keep)
