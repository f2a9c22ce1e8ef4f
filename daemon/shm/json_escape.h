/* The text that a JSON string stands for: its escapes resolved, as UTF-8. */
#ifndef POINTSMAN_JSON_ESCAPE_H
#define POINTSMAN_JSON_ESCAPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "json_string.h"

#define PX_ALWAYS_INLINE inline __attribute__((always_inline))

/* `*p` stands behind the u; it is moved behind what was read. A surrogate without its other half is written in three
 * bytes as if it were a character, broken digits as the letter u: any answer will do that is always the same.
 * Returns the bytes written. */
static PX_ALWAYS_INLINE uint64_t px_unescape_unicode(const unsigned char **p, const unsigned char *end, unsigned char out[4]) {
    int high = json_hex4(*p, end);
    if (high < 0) {
        out[0] = 'u';
        return 1;
    }
    *p += 4;
    uint32_t code = (uint32_t)high;
    if (high >= 0xD800 && high < 0xDC00 && end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u') {
        int low = json_hex4(*p + 2, end);
        if (low >= 0xDC00 && low < 0xE000) {
            *p += 6;
            code = 0x10000 + ((uint32_t)(high - 0xD800) << 10) + (uint32_t)(low - 0xDC00);
        }
    }
    if (code < 0x80) {
        out[0] = (unsigned char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (unsigned char)(0xC0 | code >> 6);
        out[1] = (unsigned char)(0x80 | (code & 63));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (unsigned char)(0xE0 | code >> 12);
        out[1] = (unsigned char)(0x80 | (code >> 6 & 63));
        out[2] = (unsigned char)(0x80 | (code & 63));
        return 3;
    }
    out[0] = (unsigned char)(0xF0 | code >> 18);
    out[1] = (unsigned char)(0x80 | (code >> 12 & 63));
    out[2] = (unsigned char)(0x80 | (code >> 6 & 63));
    out[3] = (unsigned char)(0x80 | (code & 63));
    return 4;
}

/* Escapes like this one that follow each other, while `*to` is before `last`; they come in crowds. `*p` stands behind the
 * first u. */
static PX_ALWAYS_INLINE void px_unescape_unicodes(
    const unsigned char **p, const unsigned char *end, unsigned char **to, const unsigned char *last
) {
    for (;;) {
        *to += px_unescape_unicode(p, end, *to);
        if (*to >= last || end - *p < 2 || (*p)[0] != '\\' || (*p)[1] != 'u') return;
        *p += 2;
    }
}

/* What stands behind the backslash of a short escape, exclusive-or'd with what it stands for; most stand for themselves. */
static const unsigned char px_short_escape[256] = {
    ['n'] = 'n' ^ '\n', ['t'] = 't' ^ '\t', ['r'] = 'r' ^ '\r', ['b'] = 'b' ^ '\b', ['f'] = 'f' ^ '\f',
};

#ifdef JSON_HAS_WIDE
/* As `px_unescape`, in blocks of 64 bytes: what is escaped is looked up, the backslashes before it are pressed out, and no
 * branch depends on where they are. At a \\uXXXX the block ends, behind it the next begins. */
static JSON_WIDE size_t px_unescape_wide(const unsigned char **p, const unsigned char *end, unsigned char *out, size_t room) {
    const __m512i low = _mm512_loadu_si512(px_short_escape), high = _mm512_loadu_si512(px_short_escape + 64);
    const unsigned char *at = *p, *last = out + room - 68; /* a block and a character have room behind it */
    unsigned char *to = out;
    uint64_t is_first_escaped = 0;
    while (at < end && to < last) {
        unsigned size = end - at < 64 ? (unsigned)(end - at) : 64;
        __m512i block = end - at < 64 ? _mm512_maskz_loadu_epi8(_bzhi_u64(UINT64_MAX, size), at) : _mm512_loadu_si512(at);
        uint64_t backslashes = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8('\\'));
        uint64_t us = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8('u'));
        __asm__("" : "+r"(us)); /* GCC would make a masked comparison of the next, that waits for the first one */
        us &= backslashes << 1 | is_first_escaped;
        uint64_t escaped = json_escaped(backslashes, &is_first_escaped), kept = escaped | ~backslashes;
        __m512i turn = _mm512_maskz_permutex2var_epi8(escaped & ~_mm512_movepi8_mask(block), low, block, high);
        __m512i text = _mm512_maskz_compress_epi8(_bzhi_u64(kept, size), _mm512_xor_si512(block, turn));
        _mm512_storeu_si512(to, text);
        /* `us` is known before `escaped`, and nearly always right: so the next block need not wait. */
        while (us && !(escaped >> __builtin_ctzll(us) & 1)) us &= us - 1;
        if (us) {
            unsigned u = (unsigned)__builtin_ctzll(us);
            to += __builtin_popcountll(_bzhi_u64(kept, u));
            at += u + 1;
            is_first_escaped = 0;
            px_unescape_unicodes(&at, end, &to, last);
            continue;
        }
        to += __builtin_popcountll(_bzhi_u64(kept, size));
        at += size;
        if (at == end) { /* a backslash that nothing follows is not valid JSON: as it stands */
            if (size == 64 ? is_first_escaped : escaped >> size & 1) *to++ = '\\';
            is_first_escaped = 0;
        }
    }
    *p = at - is_first_escaped;
    return (size_t)(to - out);
}
#endif

#ifdef __SSE2__
/* Written out: in a large function GCC leaves the loops that they would be. */
static inline void px_copy64(unsigned char *to, const unsigned char *from) {
    const __m128i *in = (const __m128i *)from;
    __m128i *out = (__m128i *)to, a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    _mm_storeu_si128(out, a);
    _mm_storeu_si128(out + 1, b);
    _mm_storeu_si128(out + 2, c);
    _mm_storeu_si128(out + 3, d);
}

static inline uint64_t px_backslashes16(const unsigned char *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\')));
}

static inline uint64_t px_backslashes(const unsigned char *p) {
    uint64_t low = px_backslashes16(p) | px_backslashes16(p + 16) << 16;
    return low | (px_backslashes16(p + 32) | px_backslashes16(p + 48) << 16) << 32;
}

/* The bulk of `px_unescape`, 64 bytes at a time: all are copied, and once more from behind every backslash. Ends early, before
 * a \\u or near an end. */
static inline void px_unescape_bulk(
    const unsigned char **p, const unsigned char *end, unsigned char **out, const unsigned char *last
) {
    const unsigned char *at = *p;
    unsigned char *to = *out;
    while (end - at >= 130 && last - to >= 130) {
        uint64_t marks = px_backslashes(at);
        int done = 0; /* bytes of this block that were read */
        px_copy64(to, at);
        while (marks) {
            int mark = __builtin_ctzll(marks);
            unsigned char c = at[mark + 1];
            to += mark - done;
            done = mark + 2;
            if (c == 'u') {
                *p = at + mark;
                *out = to;
                return;
            }
            *to++ = c ^ px_short_escape[c];
            px_copy64(to, at + done);
            marks &= ~((uint64_t)3 << mark);
        }
        if (done < 64) {
            to += 64 - done;
            done = 64;
        }
        at += done;
    }
    *p = at;
    *out = to;
}
#endif

/* Resolves escapes from `*p` on until `end` or until `out`, of at least 256 bytes, is nearly full; moves `*p`, returns the
 * bytes written. */
static size_t px_unescape(const unsigned char **p, const unsigned char *end, unsigned char *out, size_t room) {
#ifdef JSON_HAS_WIDE
    if (json_is_wide) return px_unescape_wide(p, end, out, room);
#endif
    const unsigned char *at = *p, *last = out + room - 4; /* an escape is at most four bytes of text */
    unsigned char *to = out;
    while (at < end && to < last) {
#ifdef __SSE2__
        px_unescape_bulk(&at, end, &to, last);
#endif
        if (*at != '\\') {
            size_t most = (size_t)(end - at) < (size_t)(last - to) ? (size_t)(end - at) : (size_t)(last - to);
            const unsigned char *escape = memchr(at, '\\', most);
            size_t run = escape ? (size_t)(escape - at) : most;
            memcpy(to, at, run);
            at += run;
            to += run;
            continue;
        }
        if (end - at < 2) { /* not valid JSON: as it stands */
            *to++ = *at++;
            continue;
        }
        unsigned char c = at[1];
        at += 2;
        if (c == 'u') px_unescape_unicodes(&at, end, &to, last);
        else *to++ = c ^ px_short_escape[c];
    }
    *p = at;
    return (size_t)(to - out);
}

#endif
