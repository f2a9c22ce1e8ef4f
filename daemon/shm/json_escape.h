/* What a \\uXXXX escape of JSON stands for, as UTF-8. */
#ifndef POINTSMAN_JSON_ESCAPE_H
#define POINTSMAN_JSON_ESCAPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

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

/* Resolves escapes from `*p` on until `end` or until `out` (of at least 8 bytes) is full; moves `*p`, returns the bytes
 * written. */
static size_t px_unescape(const unsigned char **p, const unsigned char *end, unsigned char *out, size_t room) {
    const unsigned char *at = *p;
    unsigned char *to = out, *last = out + room - 4; /* an escape is at most four bytes of text */
    while (at < end && to < last) {
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
        switch (c) {
        case 'n': *to++ = '\n'; break;
        case 't': *to++ = '\t'; break;
        case 'r': *to++ = '\r'; break;
        case 'b': *to++ = '\b'; break;
        case 'f': *to++ = '\f'; break;
        case 'u': to += px_unescape_unicode(&at, end, to); break;
        default: *to++ = c;
        }
    }
    *p = at;
    return (size_t)(to - out);
}

#endif
