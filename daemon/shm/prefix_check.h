/* The full recount: every invariant of the prefix index, from nothing but the records. For tests and `doctor`s, not
 * for the request path: it reads the whole segment under the mutex. */
#ifndef POINTSMAN_PREFIX_CHECK_H
#define POINTSMAN_PREFIX_CHECK_H

#include "prefix_core.h"

typedef struct { char *text; size_t size, used; int count; } px_report;

static __attribute__((format(printf, 2, 3))) void px_wrong(px_report *report, const char *format, ...) {
    va_list args;
    report->count++;
    if (report->used + 160 > report->size) return;
    va_start(args, format);
    report->used += (size_t)vsnprintf(report->text + report->used, 159, format, args);
    va_end(args);
    report->text[report->used++] = '\n';
    report->text[report->used] = 0;
}

#define PX_EXPECT(claim, ...) do { if (!(claim)) px_wrong(report, __VA_ARGS__); } while (0)

typedef struct { uint32_t holders, children, pins, seen; } px_recount;

static void px_check_blocks(px_index *ix, px_report *report, px_recount *of_block) {
    px_header *head = ix->head;
    uint64_t i, used = 0, reached = 0, freed = 0;
    for (i = 0; i < head->block_count; i++) used += ix->blocks[i].holders != 0;
    PX_EXPECT(used == head->blocks_used, "blocks_used %llu, recount %llu", (unsigned long long)head->blocks_used, (unsigned long long)used);
    for (i = 0; i < head->table_size; i++) {
        uint64_t entry = ix->table[i];
        uint32_t b = (uint32_t)entry;
        if (entry == PX_EMPTY) continue;
        if (b >= head->block_count || of_block[b].seen++) { px_wrong(report, "table %llu: bad or repeated block %u", (unsigned long long)i, b); continue; }
        reached++;
        PX_EXPECT(ix->blocks[b].holders, "free block %u in the table", b);
        PX_EXPECT(entry == px_entry(ix->blocks[b].hash, b), "block %u: another hash in the table", b);
        PX_EXPECT(px_find_block(ix, ix->blocks[b].hash) == b, "block %u is not found", b);
    }
    PX_EXPECT(reached == used, "%llu blocks in the table, %llu used", (unsigned long long)reached, (unsigned long long)used);
    for (uint64_t b = head->free_block; b != PX_NONE; b = ix->blocks[b].next) {
        if (b >= head->block_count || of_block[b].seen++) { px_wrong(report, "free list: bad or repeated block %llu", (unsigned long long)b); break; }
        freed++;
    }
    PX_EXPECT(freed + used == head->block_count, "%llu free + %llu used blocks of %llu", (unsigned long long)freed, (unsigned long long)used, (unsigned long long)head->block_count);
}

static void px_check_holdings(px_index *ix, px_report *report, px_recount *of_block, px_recount *of_holding) {
    px_header *head = ix->head;
    uint64_t i, used = 0, reached = 0, freed = 0;
    for (i = 0; i < head->holding_count; i++) {
        px_holding *h = &ix->holdings[i];
        if (h->slot == PX_FREE) continue;
        used++;
        if (h->slot >= head->slots || h->block >= head->block_count) { px_wrong(report, "holding %llu: bad slot or block", (unsigned long long)i); continue; }
        px_block *block = &ix->blocks[h->block];
        of_block[h->block].holders++;
        PX_EXPECT(px_holds(block, h->slot), "holding %llu: no bit in its block's mask", (unsigned long long)i);
        PX_EXPECT(px_find_holding(ix, h->block, h->slot) == i, "holding %llu is not found", (unsigned long long)i);
        if (h->parent == PX_NONE) {
            PX_EXPECT(block->parent == PX_NONE, "holding %llu: a root, its block is not", (unsigned long long)i);
        } else if (h->parent >= head->holding_count || ix->holdings[h->parent].slot != h->slot) {
            px_wrong(report, "holding %llu: its parent is free or another worker's", (unsigned long long)i);
        } else {
            of_holding[h->parent].children++;
            of_holding[h->parent].pins += h->pins != 0;
            PX_EXPECT(ix->holdings[h->parent].block == block->parent, "holding %llu: parent holds another block", (unsigned long long)i);
        }
    }
    PX_EXPECT(used == head->holdings_used, "holdings_used %llu, recount %llu", (unsigned long long)head->holdings_used, (unsigned long long)used);
    for (i = 0; i < head->holding_buckets; i++)
        for (uint32_t h = ix->holding_heads[i]; h != PX_NONE; h = ix->holdings[h].bucket_next) {
            if (h >= head->holding_count || of_holding[h].seen++) { px_wrong(report, "bucket %llu: bad or repeated holding %u", (unsigned long long)i, h); break; }
            reached++;
        }
    PX_EXPECT(reached == used, "%llu holdings in buckets, %llu used", (unsigned long long)reached, (unsigned long long)used);
    for (uint64_t h = head->free_holding; h != PX_NONE; h = ix->holdings[h].bucket_next) {
        if (h >= head->holding_count || of_holding[h].seen++) { px_wrong(report, "free list: bad or repeated holding %llu", (unsigned long long)h); break; }
        freed++;
    }
    PX_EXPECT(freed + used == head->holding_count, "%llu free + %llu used holdings of %llu", (unsigned long long)freed, (unsigned long long)used, (unsigned long long)head->holding_count);
    for (i = 0; i < head->block_count; i++) {
        px_block *block = &ix->blocks[i];
        uint32_t bits = 0;
        if (!block->holders) continue;
        for (int word = 0; word < PX_MASK; word++) bits += (uint32_t)__builtin_popcountll(block->mask[word]);
        PX_EXPECT(bits == block->holders && of_block[i].holders == bits, "block %llu: %u holders, %u bits, %u holdings",
                  (unsigned long long)i, block->holders, bits, of_block[i].holders);
    }
}

static void px_check_pins(px_index *ix, px_report *report, px_recount *of_holding, uint64_t *pins_of_slot) {
    px_header *head = ix->head;
    uint64_t i, used = 0, freed = 0;
    for (i = 0; i < head->pin_count; i++) {
        px_pin *pin = &ix->pins[i];
        if (pin->holding == PX_NONE) continue;
        used++;
        if (pin->holding >= head->holding_count || pin->slot >= head->slots || ix->holdings[pin->holding].slot != pin->slot) {
            px_wrong(report, "pin %llu: not on a holding of its worker", (unsigned long long)i);
            continue;
        }
        of_holding[pin->holding].pins++;
        pins_of_slot[pin->slot]++;
    }
    PX_EXPECT(used == head->pins_used, "pins_used %llu, recount %llu", (unsigned long long)head->pins_used, (unsigned long long)used);
    for (uint64_t p = head->free_pin; p != PX_NONE && freed <= head->pin_count; p = ix->pins[p].next) {
        PX_EXPECT(ix->pins[p].holding == PX_NONE, "pin %llu is free and used", (unsigned long long)p);
        freed++;
    }
    PX_EXPECT(freed + used == head->pin_count, "%llu free + %llu used pins", (unsigned long long)freed, (unsigned long long)used);
}

static void px_check_slots(px_index *ix, px_report *report, px_recount *of_holding, uint64_t *pins_of_slot) {
    px_header *head = ix->head;
    uint64_t i, *sums = calloc(head->slots * 3, sizeof(uint64_t));
    if (!sums) { px_wrong(report, "no memory"); return; }
    for (i = 0; i < head->slots; i++) {
        uint32_t before = PX_NONE, h;
        uint64_t stamp = 0, steps = 0;
        for (h = ix->slots[i].cold; h != PX_NONE; before = h, h = ix->holdings[h].next) {
            if (h >= head->holding_count || steps++ > head->holding_count) { px_wrong(report, "slot %llu: broken order of use", (unsigned long long)i); break; }
            px_holding *holding = &ix->holdings[h];
            PX_EXPECT(holding->slot == i && holding->listed == 1 && holding->prev == before, "slot %llu: bad entry %u in its order", (unsigned long long)i, h);
            PX_EXPECT(holding->stamp >= stamp, "slot %llu: entry %u out of order", (unsigned long long)i, h);
            stamp = holding->stamp;
            holding->listed = 2; /* seen; set back below */
        }
        PX_EXPECT(ix->slots[i].hot == before, "slot %llu: wrong hot end", (unsigned long long)i);
    }
    for (i = 0; i < head->holding_count; i++) {
        px_holding *h = &ix->holdings[i];
        if (h->slot == PX_FREE || h->slot >= head->slots) continue;
        PX_EXPECT(h->listed != 1, "holding %llu says it is in the order, and is not", (unsigned long long)i);
        if (h->listed == 2) h->listed = 1;
        PX_EXPECT(h->children == of_holding[i].children, "holding %llu: %u children, recount %u", (unsigned long long)i, h->children, of_holding[i].children);
        PX_EXPECT(h->pins == of_holding[i].pins, "holding %llu: %u pins, recount %u", (unsigned long long)i, h->pins, of_holding[i].pins);
        PX_EXPECT(h->children || h->pins || h->listed, "holding %llu: a free leaf outside the order", (unsigned long long)i);
        PX_EXPECT(h->stamp <= head->clock, "holding %llu: used in the future", (unsigned long long)i);
        sums[h->slot * 3] += ix->blocks[h->block].chars;
        sums[h->slot * 3 + 1]++;
        if (h->pins) sums[h->slot * 3 + 2] += ix->blocks[h->block].chars;
    }
    for (i = 0; i < head->slots; i++) {
        px_slot *slot = &ix->slots[i];
        PX_EXPECT(slot->chars == sums[i * 3], "slot %llu: %llu chars, recount %llu", (unsigned long long)i, (unsigned long long)slot->chars, (unsigned long long)sums[i * 3]);
        PX_EXPECT(slot->blocks == sums[i * 3 + 1], "slot %llu: %llu blocks, recount %llu", (unsigned long long)i, (unsigned long long)slot->blocks, (unsigned long long)sums[i * 3 + 1]);
        PX_EXPECT(slot->pinned == sums[i * 3 + 2], "slot %llu: %llu pinned, recount %llu", (unsigned long long)i, (unsigned long long)slot->pinned, (unsigned long long)sums[i * 3 + 2]);
        PX_EXPECT(slot->pins == pins_of_slot[i], "slot %llu: %llu pins, recount %llu", (unsigned long long)i, (unsigned long long)slot->pins, (unsigned long long)pins_of_slot[i]);
        PX_EXPECT((slot->forgetting != 0) == (int)(head->forgetting[i >> 6] >> (i & 63) & 1), "slot %llu: forgetting and its mask differ", (unsigned long long)i);
    }
    free(sums);
}

/* Number of violations; their texts, a line each, in `text` as far as they fit. */
static int px_check(px_index *ix, char *text, size_t size) {
    px_header *head = ix->head;
    px_report whole = {text, size, 0, 0}, *report = &whole;
    px_recount *of_block = calloc(head->block_count + 1, sizeof *of_block);
    px_recount *of_holding = calloc(head->holding_count + 1, sizeof *of_holding);
    uint64_t *pins_of_slot = calloc(head->slots + 1, sizeof *pins_of_slot);
    text[0] = 0;
    if (!of_block || !of_holding || !pins_of_slot) {
        px_wrong(report, "no memory");
    } else {
        PX_EXPECT(!head->journal_size, "a step is under way");
        px_check_blocks(ix, report, of_block);
        px_check_holdings(ix, report, of_block, of_holding);
        px_check_pins(ix, report, of_holding, pins_of_slot);
        px_check_slots(ix, report, of_holding, pins_of_slot);
    }
    free(of_block);
    free(of_holding);
    free(pins_of_slot);
    return whole.count;
}

#endif
