/* The keyed 64-bit hash of the prefix index: digests of blocks, chained.
 *
 * Built from one primitive, the folded 64 x 64 -> 128 bit product ("mum") that wyhash and XXH3 made known, in the
 * variant that keeps its operands: a ^= low, b ^= high, so that a factor of zero does not wipe out what was hashed
 * before. Four independent lanes of 16 bytes a round keep the multiplier busy. All constants that meet the data are
 * drawn from the seed: who does not know the seed cannot choose texts that collide (short of breaking a
 * non-cryptographic hash by its timing or answers), and indexes with different seeds do not understand each other.
 *
 *     digest_i = D(key, block_i)                   128 bits, blocks are independent: their rounds overlap in the CPU
 *     hash_i   = C(key, hash_{i-1}, digest_i, size_i)   64 bits; two chains are equal up to where their hashes are
 *
 * The size is part of the chain: a tail is never taken for the beginning of a full block.
 */
#ifndef POINTSMAN_PREFIX_HASH_H
#define POINTSMAN_PREFIX_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint64_t word[10]; } px_key;

static inline uint64_t px_splitmix(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

static inline void px_key_init(px_key *key, uint64_t seed) {
    for (int i = 0; i < 10; i++) key->word[i] = px_splitmix(&seed);
}

static inline uint64_t px_read(const unsigned char *p) {
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

static inline uint64_t px_mix(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return a ^ b ^ (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline void px_round(const px_key *key, const unsigned char *p, uint64_t lane[4]) {
    lane[0] = px_mix(px_read(p) ^ key->word[4], px_read(p + 8) ^ lane[0]);
    lane[1] = px_mix(px_read(p + 16) ^ key->word[5], px_read(p + 24) ^ lane[1]);
    lane[2] = px_mix(px_read(p + 32) ^ key->word[6], px_read(p + 40) ^ lane[2]);
    lane[3] = px_mix(px_read(p + 48) ^ key->word[7], px_read(p + 56) ^ lane[3]);
}

static inline void px_digest(const px_key *key, const unsigned char *p, size_t size, uint64_t out[2]) {
    uint64_t lane[4] = {key->word[0] ^ size, key->word[1], key->word[2], key->word[3]};
    for (; size >= 64; size -= 64, p += 64) px_round(key, p, lane);
    if (size) { /* zero padding is unambiguous, the size is in the first lane */
        unsigned char rest[64] = {0};
        memcpy(rest, p, size);
        px_round(key, rest, lane);
    }
    out[0] = px_mix(lane[0] ^ key->word[8], px_mix(lane[1], lane[2] ^ key->word[9]));
    out[1] = px_mix(lane[2] ^ key->word[9], px_mix(lane[3], lane[0] ^ key->word[8]));
}

static inline uint64_t px_chain(const px_key *key, uint64_t previous, const uint64_t digest[2], uint64_t size) {
    uint64_t inner = px_mix(previous ^ digest[0], digest[1] ^ key->word[0]);
    return px_mix(inner ^ key->word[1], previous ^ key->word[2] ^ size);
}

/* Where a chain begins: the salt (model, LoRA), and whether text or block ids follow. */
static inline uint64_t px_start(const px_key *key, const unsigned char *salt, size_t size, uint64_t kind) {
    uint64_t digest[2];
    px_digest(key, salt, size, digest);
    return px_chain(key, key->word[3] + kind, digest, size);
}

static inline uint64_t px_next_text(const px_key *key, uint64_t previous, const unsigned char *p, size_t size) {
    uint64_t digest[2];
    px_digest(key, p, size, digest);
    return px_chain(key, previous, digest, size);
}

static inline uint64_t px_next_id(const px_key *key, uint64_t previous, uint64_t id, uint64_t size) {
    uint64_t digest[2] = {px_mix(id ^ key->word[4], key->word[5]), px_mix(id ^ key->word[6], key->word[7])};
    return px_chain(key, previous, digest, size);
}

#endif
