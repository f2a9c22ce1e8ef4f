/* What reading JSON strings has in common, and by which way they are read.
 *
 * What costs time in a text with escapes is not its bytes: nobody can guess where the next escape stands, so a branch per
 * escape is a branch mispredicted per escape. Hence masks, a bit for each of 64 bytes, and tables; branches only on what is
 * rare.
 *
 * Where the CPU has AVX-512 with permutations of bytes (VBMI, VBMI2: Intel since Ice Lake, AMD since Zen 4) strings go a way of
 * their own: functions marked JSON_WIDE, taken while `json_is_wide`. All else takes the portable way. Both find the same:
 * hashes of texts are shared by processes, and outlive them.
 */
#ifndef POINTSMAN_JSON_STRING_H
#define POINTSMAN_JSON_STRING_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define JSON_HAS_WIDE 1
#define JSON_WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")))
#endif

/* Of the extension that includes this. */
static int json_is_wide;

/* To be called once before strings are read: the wide way, if it is allowed and the CPU has it. */
static void json_choose_width(int is_wide_allowed) {
    json_is_wide = 0;
#ifdef JSON_HAS_WIDE
    __builtin_cpu_init();
    json_is_wide = is_wide_allowed && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                   __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
    (void)is_wide_allowed;
#endif
}

/* Of 64 bytes those that a backslash before them escapes, given the backslashes, and (0 or 1) whether the first byte is escaped
 * by what stands before it; that is moved on. In a run of backslashes every second one is escaped. Which these are, a
 * subtraction tells: its borrows run through a run from its start on, against the bits of all odd places (as in simdjson). */
static inline uint64_t json_escaped(uint64_t backslashes, uint64_t *is_first_escaped) {
    const uint64_t odd = 0xAAAAAAAAAAAAAAAAULL;
    uint64_t may_start = backslashes & ~*is_first_escaped;
    uint64_t turns = ((may_start << 1 | odd) - may_start) ^ odd;
    uint64_t escaped = turns ^ (backslashes | *is_first_escaped);
    *is_first_escaped = (turns & backslashes) >> 63;
    return escaped;
}

/* The value of a hexadecimal digit and one more; 0 = none. */
static const unsigned char json_digit[256] = {
    ['0'] = 1, ['1'] = 2, ['2'] = 3, ['3'] = 4, ['4'] = 5, ['5'] = 6, ['6'] = 7, ['7'] = 8, ['8'] = 9, ['9'] = 10,
    ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
    ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
};

/* The value of four hexadecimal digits; -1 when there are not four before `end`. */
static inline int json_hex4(const unsigned char *p, const unsigned char *end) {
    if (end - p < 4) return -1;
    uint32_t value = (json_digit[p[0]] - 1u) << 12 | (json_digit[p[1]] - 1u) << 8 | (json_digit[p[2]] - 1u) << 4 |
                     (json_digit[p[3]] - 1u); /* what is no digit sets all bits above */
    return value <= 0xFFFF ? (int)value : -1;
}

#endif
