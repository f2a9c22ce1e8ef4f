/* The prefix index on its segment: blocks, holdings, order of use, pins, the undo journal, recovery, the full check.
 *
 * prefix.pyx opens with the theory of operation. Rules of this file:
 *
 * - A word of the segment that a live structure depends on is written through `px_set*`, which notes its old value in
 *   the journal first. Fields of a free entry may be written plainly: nobody reads them until it is linked.
 * - A *step* is what lies between two `px_commit`s. It touches at most PX_JOURNAL words, and every invariant that
 *   `px_check` looks at holds at its ends.
 * - Only the holder of the mutex calls anything here, except `px_lock` and reads of single words.
 */
#ifndef POINTSMAN_PREFIX_CORE_H
#define POINTSMAN_PREFIX_CORE_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "prefix_hash.h"

#define PX_NONE 0xFFFFFFFFu
#define PX_FREE 0xFFFFu /* a holding's slot, while nobody uses it */
#define PX_SLOTS 256
#define PX_MASK (PX_SLOTS / 64)
#define PX_JOURNAL 250 /* a step needs some 25, and one per entry that a removal shifts; see PX_RUN */
#define PX_RUN 32 /* blocks of one step that adds or pins: at most five words each */
#define PX_ALL UINT64_MAX
#define PX_OVERDUE 256 /* evictions towards a lowered capacity that one insert or unpin does on top of its own */
#define PX_SPARE 16 /* so many more than needed, or each short prompt would look for the oldest worker anew */
#define PX_BATCH 64 /* evictions for memory per choice of the worker with the oldest leaf */

#define PX_FAR 16 /* drops; see px_look_ahead */
#define PX_NEAR 8
#define PX_EXPECTED 256 /* blocks of a chain that are asked for ahead */

#define PX_BARRIER() __asm__ volatile("" ::: "memory")
#define PX_INLINE inline __attribute__((always_inline))
#define PX_UNLIKELY(x) __builtin_expect(!!(x), 0)

typedef uint64_t __attribute__((may_alias)) px_word;

typedef struct {
    uint64_t hash;
    uint64_t mask[PX_MASK]; /* which slots hold it */
    uint32_t chars;
    uint32_t parent;        /* the block before it */
    uint32_t next;          /* in the free list */
    uint32_t holders;       /* bits in mask; 0 = free */
    uint64_t reserved;
} px_block;

typedef struct {
    uint32_t block;
    uint32_t parent;        /* the same worker's holding of the block before */
    uint32_t prev, next;    /* in its worker's order of use: prev is colder */
    uint32_t bucket_next;   /* or in the free list */
    uint16_t slot;
    uint16_t listed;        /* is in the order of use */
    uint32_t children;      /* holdings of the same worker whose parent it is */
    uint32_t pins;          /* pin records on it + pinned children */
    uint64_t stamp;
} px_holding;

typedef struct {
    uint32_t holding;       /* PX_NONE = free */
    uint16_t slot;
    uint16_t shard;
    uint32_t nonce;
    uint32_t next;
} px_pin;

typedef struct {
    uint64_t chars, blocks, pinned, pins;
    uint64_t capacity;      /* 0 = unlimited */
    uint64_t forgetting;    /* 0 = no; PX_ALL = pins to be voided yet; else forget what was used last up to this stamp */
    uint32_t cold, hot;     /* ends of the order of use */
    uint64_t evicted;
    uint64_t reserved[8];
} px_slot;

typedef struct { uint64_t offset, old; } px_undo;

typedef struct {
    /* written once, by the creator */
    uint64_t magic, version, size, block_bytes, seed, slots;
    uint64_t block_count, holding_count, pin_count, table_size, holding_buckets;
    uint64_t off_slots, off_table, off_holding_heads, off_blocks, off_holdings, off_pins;
    uint64_t padding0[15];
    union { pthread_mutex_t mutex; uint64_t mutex_words[16]; };
    /* under the mutex, journalled */
    uint64_t clock, free_block, free_holding, free_pin, blocks_used, holdings_used, pins_used, padding1;
    uint64_t forgetting[PX_MASK], padding2[4];
    /* counters: only grow, not journalled */
    uint64_t evictions, memory_evictions, truncations, pin_failures, lock_timeouts, recoveries, resets, dropped_pins;
    uint64_t padding3[440];
    /* second page */
    uint64_t journal_size, padding4[7];
    px_undo journal[PX_JOURNAL];
} px_header;

typedef struct {
    unsigned char *base;
    px_header *head;
    px_slot *slots;
    uint64_t *table;        /* tag << 32 | block: open addressing, linear probing */
    uint32_t *holding_heads;
    px_block *blocks;
    px_holding *holdings;
    px_pin *pins;
    uint64_t table_mask, holding_mask;
    uint32_t expected, near, far; /* of the next drop; see px_look_ahead */
} px_index;

/* --- steps, journal, recovery */

/* The kill tests' countdown: the process ends at the n-th journalled store or commit. 0 = off. */
static uint64_t px_abort_countdown = 0;

static __attribute__((cold, noinline)) void px_abort_now(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static inline void px_abort_point(void) {
    if (PX_UNLIKELY(px_abort_countdown) && --px_abort_countdown == 0) px_abort_now();
}

static __attribute__((cold, noinline)) void px_journal_overflow(void) {
    static const char text[] = "prefix index: a step is larger than its journal\n";
    if (write(2, text, sizeof text - 1) < 0) {}
    abort(); /* a bug; the journal so far is valid, the next holder rolls back */
}

/* How many words the step has noted. A local variable of whoever makes the step, so that it stays in a register: read
 * back from the journal each time, it would cost a store-to-load forward per word. */
typedef struct { uint64_t noted; } px_step;

static PX_INLINE void px_note(px_index *ix, px_step *step, void *field) {
    px_header *head = ix->head;
    px_word *word = (px_word *)((uintptr_t)field & ~(uintptr_t)7);
    px_undo *undo = &head->journal[step->noted];
    if (PX_UNLIKELY(step->noted >= PX_JOURNAL)) px_journal_overflow();
    undo->offset = (uint64_t)((unsigned char *)word - ix->base);
    undo->old = *word;
    PX_BARRIER();
    head->journal_size = ++step->noted;
    PX_BARRIER();
    px_abort_point();
}

static PX_INLINE void px_set64(px_index *ix, px_step *step, uint64_t *field, uint64_t value) {
    px_note(ix, step, field);
    *field = value;
}

static PX_INLINE void px_set32(px_index *ix, px_step *step, uint32_t *field, uint32_t value) {
    px_note(ix, step, field);
    *field = value;
}

static PX_INLINE void px_set16(px_index *ix, px_step *step, uint16_t *field, uint16_t value) {
    px_note(ix, step, field);
    *field = value;
}

static PX_INLINE void px_commit(px_index *ix, px_step *step) {
    PX_BARRIER();
    px_abort_point();
    ix->head->journal_size = step->noted = 0;
    PX_BARRIER();
}

/* Undo the step that was under way. Idempotent at every instruction, so a recoverer may die too. */
static int px_rollback(px_index *ix) {
    px_header *head = ix->head;
    uint64_t n = head->journal_size;
    if (n > PX_JOURNAL) return 0;
    while (n) {
        uint64_t offset = head->journal[n - 1].offset;
        if (offset & 7 || offset + 8 > head->size) return 0;
        *(px_word *)(ix->base + offset) = head->journal[n - 1].old;
        PX_BARRIER();
        px_abort_point();
        head->journal_size = --n;
        PX_BARRIER();
        px_abort_point();
    }
    return 1;
}

/* Everything empty; capacities and pin nonces stay, so that old pin tokens stay void. */
static void px_clear(px_index *ix) {
    px_header *head = ix->head;
    uint64_t i;
    memset(ix->table, 0xFF, head->table_size * sizeof(uint64_t));
    memset(ix->holding_heads, 0xFF, head->holding_buckets * sizeof(uint32_t));
    for (i = 0; i < head->block_count; i++) {
        memset(&ix->blocks[i], 0, sizeof(px_block));
        ix->blocks[i].next = i + 1 < head->block_count ? (uint32_t)(i + 1) : PX_NONE;
    }
    for (i = 0; i < head->holding_count; i++) {
        memset(&ix->holdings[i], 0, sizeof(px_holding));
        ix->holdings[i].slot = PX_FREE;
        ix->holdings[i].bucket_next = i + 1 < head->holding_count ? (uint32_t)(i + 1) : PX_NONE;
    }
    for (i = 0; i < head->pin_count; i++) {
        ix->pins[i].holding = PX_NONE;
        ix->pins[i].nonce = (ix->pins[i].nonce + 1) & 0x7FFFFFFF;
        ix->pins[i].next = i + 1 < head->pin_count ? (uint32_t)(i + 1) : PX_NONE;
    }
    for (i = 0; i < head->slots; i++) {
        px_slot *slot = &ix->slots[i];
        slot->chars = slot->blocks = slot->pinned = slot->pins = slot->forgetting = 0;
        slot->cold = slot->hot = PX_NONE;
    }
    memset(head->forgetting, 0, sizeof head->forgetting);
    px_abort_point();
    head->free_block = head->block_count ? 0 : PX_NONE;
    head->free_holding = head->holding_count ? 0 : PX_NONE;
    head->free_pin = head->pin_count ? 0 : PX_NONE;
    head->blocks_used = head->holdings_used = head->pins_used = 0;
    PX_BARRIER();
    head->journal_size = 0;
}

/* A reset that is itself interrupted must be repeated, not rolled back: this mark says so. */
#define PX_RESETTING UINT64_MAX

static void px_reset(px_index *ix) {
    ix->head->journal_size = PX_RESETTING;
    PX_BARRIER();
    px_abort_point();
    ix->head->resets++;
    px_clear(ix);
    px_abort_point();
}

/* --- the mutex */

static int px_mutex_init(px_index *ix) {
    pthread_mutexattr_t attr;
    int code;
    _Static_assert(sizeof(pthread_mutex_t) <= 128, "the mutex does not fit its place in the header");
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    code = pthread_mutex_init(&ix->head->mutex, &attr);
    pthread_mutexattr_destroy(&attr);
    return code;
}

/* 0 = held, ETIMEDOUT, or another errno. */
static int px_settle_lock(px_index *ix, int code) {
    if (code == EOWNERDEAD) {
        if (!px_rollback(ix)) px_reset(ix);
        ix->head->recoveries++;
        code = pthread_mutex_consistent(&ix->head->mutex);
    } else if (code == ETIMEDOUT) {
        __atomic_fetch_add(&ix->head->lock_timeouts, 1, __ATOMIC_RELAXED);
    }
    return code;
}

static inline int px_try_lock(px_index *ix) { return pthread_mutex_trylock(&ix->head->mutex); }

static int px_wait_lock(px_index *ix, int64_t deadline_us) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += deadline_us / 1000000;
    until.tv_nsec += deadline_us % 1000000 * 1000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    return pthread_mutex_clocklock(&ix->head->mutex, CLOCK_MONOTONIC, &until);
}

static inline int px_unlock(px_index *ix) { return pthread_mutex_unlock(&ix->head->mutex); }

/* --- finding */

#define PX_EMPTY UINT64_MAX

static inline uint64_t px_entry(uint64_t hash, uint32_t block) { return (hash & 0xFFFFFFFF00000000ULL) | block; }

/* Where an entry would like to be: known from the entry alone, so a removal shifts others without looking at their blocks. */
static inline uint64_t px_home(px_index *ix, uint64_t entry_or_hash) { return entry_or_hash >> 32 & ix->table_mask; }

/* Blocks of a chain lie side by side in the pool, so for one slot their buckets do too. */
static inline uint32_t *px_holding_head(px_index *ix, uint32_t block, uint32_t slot) {
    return &ix->holding_heads[(block + slot * 0x9E3779B1ULL) & ix->holding_mask];
}

static inline uint32_t px_find_block(px_index *ix, uint64_t hash) {
    uint64_t at = px_home(ix, hash), entry;
    while ((entry = ix->table[at]) != PX_EMPTY) {
        if (entry >> 32 == hash >> 32 && ix->blocks[(uint32_t)entry].hash == hash) return (uint32_t)entry;
        at = (at + 1) & ix->table_mask;
    }
    return PX_NONE;
}

static inline uint32_t px_find_holding(px_index *ix, uint32_t block, uint32_t slot) {
    uint32_t i = *px_holding_head(ix, block, slot);
    while (i != PX_NONE && (ix->holdings[i].block != block || ix->holdings[i].slot != slot))
        i = ix->holdings[i].bucket_next;
    return i;
}

static inline int px_holds(const px_block *block, uint32_t slot) {
    return (int)(block->mask[slot >> 6] >> (slot & 63) & 1);
}

/* How many leading hashes of the chain exist (slot < 0), or are held by `slot`. Both are true up to a depth and false
 * from there on (a worker holds no block without the one before), so bisection finds it. */
static uint64_t px_depth(px_index *ix, const uint64_t *hashes, uint64_t from, uint64_t n, int slot) {
    uint64_t low = from, high = n, step = 1;
    while (low < high) { /* known: [0, low) true, [high, n) false */
        /* gallop first: a new prompt is done after one look, a known one after a few */
        uint64_t middle = step ? (low + step - 1 < high ? low + step - 1 : high - 1) : low + (high - low) / 2;
        uint32_t i = px_find_block(ix, hashes[middle]);
        if (i != PX_NONE && (slot < 0 || px_holds(&ix->blocks[i], (uint32_t)slot))) {
            low = middle + 1;
            step *= 4;
        } else {
            high = middle;
            step = 0;
        }
    }
    return low;
}

typedef struct {
    const uint64_t *hashes;
    uint64_t n, block_chars, total;
} px_chain_view;

typedef struct { uint64_t at; uint64_t mask[PX_MASK]; } px_level;

/* Asks for the places in the table of a chain that is going to be matched and inserted: nearly always they are in no
 * cache. Needs no mutex, and is best done before it is taken. Of a very long chain its head: what is asked for must not
 * push each other out of the cache. */
static PX_INLINE void px_expect(px_index *ix, const px_chain_view *chain) {
    uint64_t i, n = chain->n < PX_EXPECTED ? chain->n : PX_EXPECTED;
    for (i = 0; i < n; i++) __builtin_prefetch(&ix->table[px_home(ix, chain->hashes[i])], 1);
    if (chain->n > n) __builtin_prefetch(&ix->table[px_home(ix, chain->hashes[chain->n - 1])], 1);
}

/* Asks for the buckets of what `slot` is going to hold of the chain: free blocks lie side by side, mostly, hence so do
 * these. */
static PX_INLINE void px_expect_holdings(px_index *ix, const px_chain_view *chain, uint32_t slot) {
    uint64_t i, n = chain->n < PX_EXPECTED ? chain->n : PX_EXPECTED;
    for (i = 0; i < n; i += 64 / sizeof(uint32_t))
        __builtin_prefetch(px_holding_head(ix, (uint32_t)(ix->head->free_block + i), slot), 1);
}

/* For every slot the characters of the chain that it holds. Returns the largest.
 *
 * A slot's bit is set up to its depth and clear behind it. So where two blocks have equal masks all between them have
 * that mask, and only where masks differ is the stretch halved: O(distinct depths * log n) looks, not O(n). */
static uint64_t px_match(px_index *ix, const px_chain_view *chain, uint64_t *out) {
    px_header *head = ix->head;
    const uint64_t *hashes = chain->hashes;
    uint64_t n = chain->n;
    uint64_t slots = head->slots, best = 0, exists, i;
    px_level low, stack[66];
    int top = 0, word;
    memset(out, 0, slots * sizeof(uint64_t));
    if (!n || !(exists = px_depth(ix, hashes, 0, n, -1))) return 0;
    /* depths count blocks: `at` blocks are held by those in `mask` */
    low.at = 0;
    for (word = 0; word < PX_MASK; word++) low.mask[word] = ~head->forgetting[word];
    stack[top++] = (px_level){exists + 1, {0}}; /* nobody holds more than what exists */
    while (top) {
        px_level *high = &stack[top - 1];
        uint64_t left[PX_MASK], any = 0;
        for (word = 0; word < PX_MASK; word++) any |= left[word] = low.mask[word] & ~high->mask[word];
        if (!any) {
            low = *high;
            top--;
        } else if (high->at - low.at == 1) {
            uint64_t chars = low.at == n ? chain->total : low.at * chain->block_chars;
            if (low.at) {
                for (word = 0; word < PX_MASK; word++)
                    for (uint64_t bits = left[word]; bits; bits &= bits - 1) {
                        i = (uint64_t)(word * 64 + __builtin_ctzll(bits));
                        if (i < slots) out[i] = chars;
                    }
                if (chars > best) best = chars;
            }
            low = *high;
            top--;
        } else {
            uint64_t middle = low.at + (high->at - low.at) / 2;
            uint32_t block = px_find_block(ix, hashes[middle - 1]);
            stack[top].at = middle;
            for (word = 0; word < PX_MASK; word++)
                stack[top].mask[word] = block == PX_NONE ? 0 : ix->blocks[block].mask[word] & low.mask[word];
            top++;
        }
    }
    return best;
}

/* --- order of use */

static PX_INLINE void px_unlist(px_index *ix, px_step *step, px_slot *slot, uint32_t i) {
    px_holding *h = &ix->holdings[i];
    if (h->prev != PX_NONE) px_set32(ix, step, &ix->holdings[h->prev].next, h->next);
    else px_set32(ix, step, &slot->cold, h->next);
    if (h->next != PX_NONE) px_set32(ix, step, &ix->holdings[h->next].prev, h->prev);
    else px_set32(ix, step, &slot->hot, h->prev);
    px_set16(ix, step, &h->listed, 0);
}

static PX_INLINE void px_list_hot(px_index *ix, px_step *step, px_slot *slot, uint32_t i) {
    px_holding *h = &ix->holdings[i];
    px_note(ix, step, &h->prev); /* prev and next share a word */
    h->prev = slot->hot;
    h->next = PX_NONE;
    px_set16(ix, step, &h->listed, 1);
    if (slot->hot != PX_NONE) px_set32(ix, step, &ix->holdings[slot->hot].next, i);
    else px_set32(ix, step, &slot->cold, i);
    px_set32(ix, step, &slot->hot, i);
}

static PX_INLINE void px_list_cold(px_index *ix, px_step *step, px_slot *slot, uint32_t i) {
    px_holding *h = &ix->holdings[i];
    px_note(ix, step, &h->prev);
    h->prev = PX_NONE;
    h->next = slot->cold;
    px_set16(ix, step, &h->listed, 1);
    if (slot->cold != PX_NONE) px_set32(ix, step, &ix->holdings[slot->cold].prev, i);
    else px_set32(ix, step, &slot->hot, i);
    px_set32(ix, step, &slot->cold, i);
}

/* One step: used just now. */
static void px_renew(px_index *ix, uint32_t i) {
    px_step here = {0}, *step = &here;
    px_holding *h = &ix->holdings[i];
    px_slot *slot = &ix->slots[h->slot];
    uint64_t stamp = ix->head->clock + 1;
    if (h->listed) px_unlist(ix, step, slot, i);
    px_list_hot(ix, step, slot, i);
    px_set64(ix, step, &h->stamp, stamp);
    px_set64(ix, step, &ix->head->clock, stamp);
    px_commit(ix, step);
}

/* --- dropping */

static PX_INLINE void px_table_add(px_index *ix, px_step *step, uint64_t hash, uint32_t block) {
    uint64_t at = px_home(ix, hash);
    while (ix->table[at] != PX_EMPTY) at = (at + 1) & ix->table_mask;
    px_set64(ix, step, &ix->table[at], px_entry(hash, block));
}

/* Shifts back what stands behind it, as far as it is out of its place: no tombstones, so probing never degrades. At most
 * half of the table is used and the hash is keyed: a run long enough to overflow the journal has no measurable chance. */
static PX_INLINE void px_table_remove(px_index *ix, px_step *step, uint64_t hash, uint32_t block) {
    uint64_t hole = px_home(ix, hash), at, wanted = px_entry(hash, block), entry;
    while (ix->table[hole] != wanted) hole = (hole + 1) & ix->table_mask;
    for (at = (hole + 1) & ix->table_mask; (entry = ix->table[at]) != PX_EMPTY; at = (at + 1) & ix->table_mask) {
        if (((at - px_home(ix, entry)) & ix->table_mask) < ((at - hole) & ix->table_mask)) continue;
        px_set64(ix, step, &ix->table[hole], entry);
        hole = at;
    }
    px_set64(ix, step, &ix->table[hole], PX_EMPTY);
}

/* What is dropped has not been used for long, so it is in no cache; but what comes next is known: the parent, and behind
 * the root the next in the order. PX_FAR drops ahead the block and what leads there is asked for; PX_NEAR drops ahead the
 * place in the table, which only the block tells. */
static inline uint32_t px_after(px_index *ix, uint32_t i, uint32_t next) {
    uint32_t parent = i == PX_NONE ? PX_NONE : ix->holdings[i].parent;
    return parent == PX_NONE ? next : parent;
}

/* Inlined by force, as the next: GCC takes a function that only prefetches for one without effect, and leaves its calls out. */
static PX_INLINE void px_want_block(px_index *ix, uint32_t i) {
    px_holding *h;
    if (i == PX_NONE) return;
    h = &ix->holdings[i];
    if (h->parent != PX_NONE) __builtin_prefetch(&ix->holdings[h->parent], 1);
    __builtin_prefetch(&ix->blocks[h->block], 1);
    __builtin_prefetch(px_holding_head(ix, h->block, h->slot), 1);
}

static PX_INLINE void px_want_place(px_index *ix, uint32_t i) {
    if (i == PX_NONE) return;
    __builtin_prefetch(&ix->table[px_home(ix, ix->blocks[ix->holdings[i].block].hash)], 1);
}

static PX_INLINE void px_look_ahead(px_index *ix, uint32_t i) {
    uint32_t next = ix->holdings[i].next, k;
    if (PX_UNLIKELY(ix->expected != i)) {
        ix->far = ix->near = i;
        for (k = 1; k < PX_FAR; k++) px_want_block(ix, ix->far = px_after(ix, ix->far, next));
        for (k = 1; k < PX_NEAR; k++) px_want_place(ix, ix->near = px_after(ix, ix->near, next));
    }
    px_want_block(ix, ix->far = px_after(ix, ix->far, next));
    px_want_place(ix, ix->near = px_after(ix, ix->near, next));
    ix->expected = px_after(ix, i, next);
}

/* One step: the worker of this leaf, which nobody pins, no longer holds the block. */
static void px_drop(px_index *ix, uint32_t i) {
    px_step here = {0}, *step = &here;
    px_header *head = ix->head;
    px_holding *h = &ix->holdings[i];
    uint32_t slot_number = h->slot, block_number = h->block;
    px_slot *slot = &ix->slots[slot_number];
    px_block *block = &ix->blocks[block_number];
    uint32_t *link;

    px_look_ahead(ix, i);
    if (h->listed) px_unlist(ix, step, slot, i);
    px_set64(ix, step, &slot->chars, slot->chars - block->chars);
    px_set64(ix, step, &slot->blocks, slot->blocks - 1);

    link = px_holding_head(ix, block_number, slot_number);
    while (*link != i) link = &ix->holdings[*link].bucket_next;
    px_set32(ix, step, link, h->bucket_next);

    if (h->parent != PX_NONE) {
        px_holding *parent = &ix->holdings[h->parent];
        px_set32(ix, step, &parent->children, parent->children - 1);
        if (!parent->children && !parent->listed) {
            px_list_cold(ix, step, slot, h->parent);
            if (parent->stamp < h->stamp) px_set64(ix, step, &parent->stamp, h->stamp);
        }
    }
    px_set64(ix, step, &block->mask[slot_number >> 6], block->mask[slot_number >> 6] & ~(1ULL << (slot_number & 63)));
    px_set32(ix, step, &block->holders, block->holders - 1);
    if (!block->holders) {
        px_table_remove(ix, step, block->hash, block_number);
        px_set32(ix, step, &block->next, (uint32_t)head->free_block);
        px_set64(ix, step, &head->free_block, block_number);
        px_set64(ix, step, &head->blocks_used, head->blocks_used - 1);
    }
    px_note(ix, step, &h->bucket_next); /* shares a word with slot and listed */
    h->bucket_next = (uint32_t)head->free_holding;
    h->slot = PX_FREE;
    px_set64(ix, step, &head->free_holding, i);
    px_set64(ix, step, &head->holdings_used, head->holdings_used - 1);
    px_commit(ix, step);
    head->evictions++;
    slot->evicted++;
}

/* The coldest leaf of a worker that nobody pins, or PX_NONE. What is no leaf any more, or pinned, leaves the order here:
 * it comes back when its last child goes or its last pin does. */
static uint32_t px_coldest(px_index *ix, px_slot *slot, uint32_t keep) {
    px_step here = {0}, *step = &here;
    uint32_t i;
    while ((i = slot->cold) != PX_NONE && i != keep) {
        px_holding *h = &ix->holdings[i];
        if (!h->children && !h->pins) return i;
        px_unlist(ix, step, slot, i);
        px_commit(ix, step);
    }
    return PX_NONE;
}

/* Drops up to `most` leaves of a worker, coldest first, while it has more than `to_chars`. Never drops `keep`. */
static uint64_t px_shrink(px_index *ix, uint32_t slot_number, uint64_t to_chars, uint64_t most, uint32_t keep) {
    px_slot *slot = &ix->slots[slot_number];
    uint64_t dropped = 0;
    uint32_t i;
    while (dropped < most && slot->chars > to_chars && (i = px_coldest(ix, slot, keep)) != PX_NONE) {
        px_drop(ix, i);
        dropped++;
    }
    return dropped;
}

/* The worker whose coldest entry is the oldest of all, or PX_NONE. */
static uint32_t px_oldest_slot(px_index *ix, uint32_t keep) {
    uint32_t i, found = PX_NONE;
    uint64_t oldest = PX_ALL;
    for (i = 0; i < ix->head->slots; i++) {
        uint32_t cold = px_coldest(ix, &ix->slots[i], keep);
        if (cold != PX_NONE && ix->holdings[cold].stamp < oldest) {
            oldest = ix->holdings[cold].stamp;
            found = i;
        }
    }
    return found;
}

/* Evicts over all workers, oldest first, until so much is free; returns the number dropped. Less may be free after it,
 * when all else is pinned or `most` was reached. */
static uint64_t px_make_room(px_index *ix, uint64_t blocks, uint64_t holdings, uint64_t most, uint32_t keep) {
    px_header *head = ix->head;
    uint64_t dropped = 0;
    while (dropped < most && (head->block_count - head->blocks_used < blocks || head->holding_count - head->holdings_used < holdings)) {
        uint32_t slot = px_oldest_slot(ix, keep), batch = 0, i;
        if (slot == PX_NONE) break;
        while (batch < PX_BATCH && dropped < most &&
               (head->block_count - head->blocks_used < blocks || head->holding_count - head->holdings_used < holdings) &&
               (i = px_coldest(ix, &ix->slots[slot], keep)) != PX_NONE) {
            px_drop(ix, i);
            batch++;
            dropped++;
        }
        head->memory_evictions += batch;
    }
    return dropped;
}

/* --- inserting */

static inline uint64_t px_size_of(const px_chain_view *chain, uint64_t i) {
    return i + 1 == chain->n ? chain->total - i * chain->block_chars : chain->block_chars;
}

/* One step: `slot` holds the blocks [from, end) of the chain, at least one and at most PX_RUN, behind `parent` (a holding,
 * or PX_NONE); those before `exists` are there already. Room was made. Returns the last holding.
 *
 * A step for many blocks, because what they change in common (heads of the free lists, sums, the order of use, in which
 * only the last has a place) is noted once for all of them. */
static uint32_t px_add_run(
    px_index *ix, uint32_t slot_number, uint32_t parent, const px_chain_view *chain, uint64_t from, uint64_t end, uint64_t exists
) {
    px_step here = {0}, *step = &here;
    px_header *head = ix->head;
    px_slot *slot = &ix->slots[slot_number];
    uint32_t free_block = (uint32_t)head->free_block, free_holding = (uint32_t)head->free_holding, last = parent;
    uint64_t word = slot_number >> 6, bit = 1ULL << (slot_number & 63), chars = 0, fresh = 0, k;
    px_holding *h = NULL;

    if (parent != PX_NONE) {
        px_set32(ix, step, &ix->holdings[parent].children, ix->holdings[parent].children + 1);
        if (ix->holdings[parent].listed) px_unlist(ix, step, slot, parent);
    }
    for (k = from; k < end; k++) {
        uint32_t block_number = k < exists ? px_find_block(ix, chain->hashes[k]) : PX_NONE, i = free_holding, *link;
        px_block *block;
        if (block_number == PX_NONE) {
            block_number = free_block;
            block = &ix->blocks[block_number];
            free_block = block->next;
            fresh++;
            px_note(ix, step, &block->next); /* shares a word with holders */
            block->hash = chain->hashes[k];
            memset(block->mask, 0, sizeof block->mask);
            block->mask[word] = bit;
            block->chars = (uint32_t)px_size_of(chain, k);
            block->parent = last == PX_NONE ? PX_NONE : ix->holdings[last].block;
            block->holders = 1;
            px_table_add(ix, step, chain->hashes[k], block_number);
        } else {
            block = &ix->blocks[block_number];
            px_set64(ix, step, &block->mask[word], block->mask[word] | bit);
            px_set32(ix, step, &block->holders, block->holders + 1);
        }
        chars += block->chars;

        h = &ix->holdings[i];
        free_holding = h->bucket_next;
        link = px_holding_head(ix, block_number, slot_number);
        px_note(ix, step, &h->bucket_next); /* shares a word with slot and listed */
        h->block = block_number;
        h->parent = last;
        h->bucket_next = *link;
        h->slot = (uint16_t)slot_number;
        h->listed = 0;
        h->children = 1;
        h->pins = 0;
        h->stamp = head->clock + (k - from) + 1;
        px_set32(ix, step, link, i);
        last = i;
    }
    h->listed = 1;
    h->children = 0;
    h->prev = slot->hot;
    h->next = PX_NONE;
    if (slot->hot != PX_NONE) px_set32(ix, step, &ix->holdings[slot->hot].next, last);
    else px_set32(ix, step, &slot->cold, last);
    px_set32(ix, step, &slot->hot, last);

    px_set64(ix, step, &slot->chars, slot->chars + chars);
    px_set64(ix, step, &slot->blocks, slot->blocks + (end - from));
    if (fresh) {
        px_set64(ix, step, &head->free_block, free_block);
        px_set64(ix, step, &head->blocks_used, head->blocks_used + fresh);
    }
    px_set64(ix, step, &head->free_holding, free_holding);
    px_set64(ix, step, &head->holdings_used, head->holdings_used + (end - from));
    px_set64(ix, step, &head->clock, head->clock + (end - from));
    px_commit(ix, step);
    return last;
}

/* One step: `slot` holds the block behind `parent`; `exists`: it is there already. As px_add_run. */
static uint32_t px_add(px_index *ix, uint32_t slot_number, uint32_t parent, uint64_t hash, uint32_t chars, int exists) {
    px_chain_view one = {&hash, 1, chars, chars};
    return px_add_run(ix, slot_number, parent, &one, 0, 1, exists ? 1 : 0);
}

/* `slot` holds the chain, used just now. Evicts what no longer fits: first to the worker's capacity, then for memory.
 * What still does not fit is left out from the end, so a worker never holds a block without the one before. With
 * `may_exceed` the capacity does not cut (memory does). Sets *deepest to the last holding. Returns blocks held. */
static uint64_t px_insert(px_index *ix, uint32_t slot_number, const px_chain_view *chain, int may_exceed, uint32_t *deepest) {
    px_header *head = ix->head;
    px_slot *slot = &ix->slots[slot_number];
    uint64_t n = chain->n, depth, exists, end, i, k, until, fresh, limit, room;
    uint32_t last = PX_NONE;

    *deepest = PX_NONE;
    if (!n) return 0;
    px_expect_holdings(ix, chain, slot_number);
    depth = px_depth(ix, chain->hashes, 0, n, (int)slot_number);
    if (depth) {
        last = px_find_holding(ix, px_find_block(ix, chain->hashes[depth - 1]), slot_number);
        px_renew(ix, last); /* and, hottest of all, it survives the evictions below */
    }
    *deepest = last;
    if (depth == n) return n;

    /* capacity: an insert never ends above it, or, where a lowered one is still being reached, never grows */
    end = n;
    fresh = chain->total - depth * chain->block_chars;
    if (slot->capacity && slot->chars + fresh > slot->capacity) {
        room = slot->capacity > fresh ? slot->capacity - fresh : 0;
        px_shrink(ix, slot_number, room, slot->chars > slot->capacity ? n - depth + PX_OVERDUE : PX_ALL, last);
        if (!may_exceed) {
            limit = slot->chars < slot->capacity ? slot->capacity - slot->chars : 0;
            while (end > depth && fresh > limit) fresh -= px_size_of(chain, --end);
        }
    }
    if (end == depth) {
        head->truncations++;
        return depth;
    }
    /* memory, at the worst case: every block is new */
    room = end - depth;
    if (head->block_count - head->blocks_used < room || head->holding_count - head->holdings_used < room) {
        px_make_room(ix, room + PX_SPARE, room + PX_SPARE, PX_ALL, last);
        if (head->block_count - head->blocks_used < room) room = head->block_count - head->blocks_used;
        if (head->holding_count - head->holdings_used < room) room = head->holding_count - head->holdings_used;
        end = depth + room;
    }
    if (end < n) head->truncations++;

    exists = px_depth(ix, chain->hashes, depth, n, -1);
    for (i = depth; i < end; i = until) {
        until = end - i < PX_RUN ? end : i + PX_RUN;
        for (k = i; k < until; k++) __builtin_prefetch(&ix->table[px_home(ix, chain->hashes[k])], 1);
        last = px_add_run(ix, slot_number, last, chain, i, until, exists);
    }
    *deepest = last;
    return end;
}

/* After pins were set or given back: towards the capacity again, a bounded part of the way. */
static void px_settle(px_index *ix, uint32_t slot_number) {
    px_slot *slot = &ix->slots[slot_number];
    if (slot->capacity && slot->chars > slot->capacity) px_shrink(ix, slot_number, slot->capacity, PX_OVERDUE, PX_NONE);
}

/* --- pins */

/* Pins the holding and all before it, for a request in flight. Returns a token, 0 when all pin records are taken.
 *
 * The record walks down from the first ancestor that is not pinned, PX_RUN blocks a step; so wherever the process ends,
 * pins == records on it + pinned children, and the slot's pinned characters are right. `path` has room for the chain. */
static uint64_t px_pin_path(px_index *ix, uint32_t target, uint32_t shard, uint32_t *path) {
    px_step here = {0}, *step = &here;
    px_header *head = ix->head;
    uint32_t number = (uint32_t)head->free_pin, slot_number = ix->holdings[target].slot, i = target;
    px_slot *slot = &ix->slots[slot_number];
    uint64_t n = 0;
    px_pin *pin;

    if (number == PX_NONE) {
        head->pin_failures++;
        return 0;
    }
    while (i != PX_NONE && !ix->holdings[i].pins) {
        path[n++] = i;
        i = ix->holdings[i].parent;
    }
    pin = &ix->pins[number];
    px_set64(ix, step, &head->free_pin, pin->next);
    px_set64(ix, step, &head->pins_used, head->pins_used + 1);
    px_set64(ix, step, &slot->pins, slot->pins + 1);
    px_note(ix, step, &pin->holding); /* with slot and shard */
    px_note(ix, step, &pin->nonce);
    pin->nonce = (pin->nonce + 1) & 0x7FFFFFFF;
    pin->slot = (uint16_t)slot_number;
    pin->shard = (uint16_t)shard;
    if (i == PX_NONE) {
        i = path[--n];
        px_set64(ix, step, &slot->pinned, slot->pinned + ix->blocks[ix->holdings[i].block].chars);
    }
    pin->holding = i;
    px_set32(ix, step, &ix->holdings[i].pins, ix->holdings[i].pins + 1);
    px_commit(ix, step);
    while (n) {
        uint64_t chars = 0, stop = n > PX_RUN ? n - PX_RUN : 0;
        while (n > stop) {
            i = path[--n];
            px_set32(ix, step, &ix->holdings[i].pins, 1);
            chars += ix->blocks[ix->holdings[i].block].chars;
        }
        /* where the record was it is lost, and a pinned child is gained */
        px_set32(ix, step, &pin->holding, i);
        px_set64(ix, step, &slot->pinned, slot->pinned + chars);
        px_commit(ix, step);
    }
    return (uint64_t)pin->nonce << 32 | (number + 1);
}

/* Takes a pin record back, from its block up to the first ancestor that others pin; renews the chain. */
static void px_unpin_record(px_index *ix, uint32_t number) {
    px_step here = {0}, *step = &here;
    px_header *head = ix->head;
    px_pin *pin = &ix->pins[number];
    px_slot *slot = &ix->slots[pin->slot];
    px_renew(ix, pin->holding);
    for (;;) {
        uint32_t i = pin->holding, run;
        uint64_t chars = 0;
        int is_last = 0;
        for (run = 0; run < PX_RUN; run++) {
            px_holding *h = &ix->holdings[i];
            px_set32(ix, step, &h->pins, h->pins - 1); /* the parent loses a pinned child, and gains the record */
            if (!h->pins) chars += ix->blocks[h->block].chars;
            is_last = h->pins || h->parent == PX_NONE;
            if (is_last) break;
            i = h->parent;
        }
        px_set64(ix, step, &slot->pinned, slot->pinned - chars);
        px_note(ix, step, &pin->holding);
        pin->holding = i;
        if (is_last) {
            px_set32(ix, step, &pin->next, (uint32_t)head->free_pin);
            pin->holding = PX_NONE;
            px_set64(ix, step, &head->free_pin, number);
            px_set64(ix, step, &head->pins_used, head->pins_used - 1);
            px_set64(ix, step, &slot->pins, slot->pins - 1);
        }
        px_commit(ix, step);
        if (is_last) return;
    }
}

/* 1 = unpinned, 0 = the token is void: its worker was forgotten, its shard reclaimed, or it was given back before. */
static int px_unpin(px_index *ix, uint64_t token) {
    uint64_t number = (token & 0xFFFFFFFF) - 1;
    px_pin *pin;
    px_slot *slot;
    if (!token || number >= ix->head->pin_count) return 0;
    pin = &ix->pins[number];
    if (pin->holding == PX_NONE || pin->nonce != token >> 32) return 0;
    slot = &ix->slots[pin->slot];
    px_unpin_record(ix, (uint32_t)number);
    px_settle(ix, (uint32_t)(slot - ix->slots));
    return 1;
}

/* Takes a pin back whose request was never computed: of what it brought, behind the first `keep` characters, everything
 * that nobody else holds on to is dropped. Returns as px_unpin does. */
static int px_withdraw(px_index *ix, uint64_t token, uint64_t keep) {
    uint64_t number = (token & 0xFFFFFFFF) - 1, chars = 0;
    uint32_t deepest, i;
    px_pin *pin;
    if (!token || number >= ix->head->pin_count) return 0;
    pin = &ix->pins[number];
    if (pin->holding == PX_NONE || pin->nonce != token >> 32) return 0;
    deepest = pin->holding;
    for (i = deepest; i != PX_NONE; i = ix->holdings[i].parent) chars += ix->blocks[ix->holdings[i].block].chars;
    px_unpin_record(ix, (uint32_t)number);
    for (i = deepest; i != PX_NONE && chars > keep; ) {
        px_holding *h = &ix->holdings[i];
        uint32_t parent = h->parent;
        if (h->children || h->pins) break;
        chars -= ix->blocks[h->block].chars;
        px_drop(ix, i);
        i = parent;
    }
    return 1;
}

/* Gives back up to `most` pins of a shard (slot < 0) or of a slot (shard < 0), from record *cursor on. */
static uint64_t px_void_pins(px_index *ix, int64_t shard, int64_t slot, uint64_t *cursor, uint64_t most) {
    uint64_t done = 0;
    for (; *cursor < ix->head->pin_count && done < most; ++*cursor) {
        px_pin *pin = &ix->pins[*cursor];
        if (pin->holding == PX_NONE || (shard >= 0 && pin->shard != shard) || (slot >= 0 && pin->slot != slot)) continue;
        px_unpin_record(ix, (uint32_t)*cursor);
        done++;
    }
    ix->head->dropped_pins += done;
    return done;
}

/* --- forgetting a worker's residency */

/* One step: from now on nothing of what the slot holds is matched. */
static void px_forget_begin(px_index *ix, uint32_t slot_number) {
    px_step here = {0}, *step = &here;
    uint64_t *mask = &ix->head->forgetting[slot_number >> 6];
    px_set64(ix, step, mask, *mask | 1ULL << (slot_number & 63));
    px_set64(ix, step, &ix->slots[slot_number].forgetting, PX_ALL);
    px_commit(ix, step);
}

/* Goes on with it: up to `most` pins and blocks. 1 = done. What was inserted after the pins were voided stays. */
static int px_forget_slice(px_index *ix, uint32_t slot_number, uint64_t most) {
    px_step here = {0}, *step = &here;
    px_slot *slot = &ix->slots[slot_number];
    uint64_t *mask = &ix->head->forgetting[slot_number >> 6];
    uint32_t i;
    if (!slot->forgetting) return 1;
    if (slot->forgetting == PX_ALL) {
        uint64_t cursor = 0;
        if (slot->pins) {
            px_void_pins(ix, -1, slot_number, &cursor, most);
            if (slot->pins) return 0;
        }
        px_set64(ix, step, &slot->forgetting, ix->head->clock);
        px_commit(ix, step);
        if (!ix->head->clock) goto done;
    }
    for (; most; most--) {
        i = px_coldest(ix, slot, PX_NONE);
        if (i == PX_NONE || ix->holdings[i].stamp > slot->forgetting) goto done;
        px_drop(ix, i);
    }
    return 0;
done:
    px_set64(ix, step, mask, *mask & ~(1ULL << (slot_number & 63)));
    px_set64(ix, step, &slot->forgetting, 0);
    px_commit(ix, step);
    return 1;
}

#endif
