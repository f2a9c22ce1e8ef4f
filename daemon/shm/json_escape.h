/* What a \\uXXXX escape of JSON stands for, as UTF-8. */
#ifndef POINTSMAN_JSON_ESCAPE_H
#define POINTSMAN_JSON_ESCAPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static inline int px_hex4(const unsigned char *p, const unsigned char *end) {
    int value = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int c = p[i], digit;
        if (c >= '0' && c <= '9') digit = c - '0';
        else if ((c | 32) >= 'a' && (c | 32) <= 'f') digit = (c | 32) - 'a' + 10;
        else return -1;
        value = value << 4 | digit;
    }
    return value;
}

/* `*p` stands behind the u; it is moved behind what was read. A surrogate without its other half is written in three
 * bytes as if it were a character, broken digits as the letter u: any answer will do that is always the same.
 * Returns the bytes written. */
static inline uint64_t px_unescape_unicode(const unsigned char **p, const unsigned char *end, unsigned char out[4]) {
    int high = px_hex4(*p, end);
    if (high < 0) {
        out[0] = 'u';
        return 1;
    }
    *p += 4;
    uint32_t code = (uint32_t)high;
    if (high >= 0xD800 && high < 0xDC00 && end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u') {
        int low = px_hex4(*p + 2, end);
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

/* What stands behind the backslash of a short escape, to what it stands for; 0 = itself. */
static const unsigned char px_short_escape[256] = {['n'] = '\n', ['t'] = '\t', ['r'] = '\r', ['b'] = '\b', ['f'] = '\f'};

#ifdef __SSE2__
static inline void px_copy64(unsigned char *to, const unsigned char *from) {
    for (int i = 0; i < 64; i += 16)
        _mm_storeu_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
}

static inline uint64_t px_backslashes(const unsigned char *p) {
    uint64_t marks = 0;
    for (int i = 0; i < 64; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(p + i));
        marks |= (uint64_t)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'))) << i;
    }
    return marks;
}

/* The bulk of `px_unescape`, 64 bytes at a time: all are copied, and once more from behind every escape. Ends early, before
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
            *to++ = px_short_escape[c] ? px_short_escape[c] : c;
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

/* Resolves escapes from `*p` on until `end` or until `out` (of at least 8 bytes) is full; moves `*p`, returns the bytes
 * written. */
static size_t px_unescape(const unsigned char **p, const unsigned char *end, unsigned char *out, size_t room) {
    const unsigned char *at = *p;
    unsigned char *to = out, *last = out + room - 4; /* an escape is at most four bytes of text */
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
        if (c == 'u') to += px_unescape_unicode(&at, end, to);
        else *to++ = px_short_escape[c] ? px_short_escape[c] : c;
    }
    *p = at;
    return (size_t)(to - out);
}

#endif
