/* What routing needs to know of a JSON request body, found in one pass that builds nothing.
 *
 * The scan is either certain or says that it is not: then a parser has to look. It is certain only of bodies that every
 * JSON parser reads alike, so it refuses more than it must: invalid JSON and UTF-8, of course, but also fields that are
 * there twice, escapes in a key or in a name that it would have to resolve, surrogates without their other half, nesting
 * beyond BS_MAX_DEPTH, numbers that somebody might round, and prompts of shapes that nobody sends.
 *
 * Only string bytes are many; they are looked at 64 or 16 at a time (json_string.h). Whatever lies behind `end` must be one
 * readable NUL, as it is behind a bytes object: no token can go on there, so most tests for the end are not needed.
 *
 * Names of functions: `bs_skip_*` returns what stands behind a valid token, NULL when it is not certain of it.
 */
#ifndef POINTSMAN_BODY_SCAN_H
#define POINTSMAN_BODY_SCAN_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "json_span.h"
#include "json_string.h"

enum {
    BS_MAX_DEPTH = 60,
    BS_MAX_SPANS = 65536,
    BS_MAX_NAME = 512,   /* bytes of a model's name: nothing has to be cut */
    BS_MAX_NUMBER = 32,  /* bytes of a number that is passed over */
    BS_MAX_INTEGER = 18, /* digits of one that is read: it fits 64 bits */
};

typedef const unsigned char *bs_at;

typedef struct { bs_at p; size_t size; } bs_text;

typedef struct { size_t first, end; } bs_range;

/* Filled by `bs_scan`. `span` and `ids` keep their memory from scan to scan, see `bs_trim`. */
typedef struct {
    bs_text model, lora; /* inside of the strings; NULL = none */
    bs_text rid;         /* the string as it stands, with its quotes; NULL = none */
    int64_t max_tokens;  /* -1 = not said */
    int is_stream;
    bs_range part[3]; /* of `span`: these, one after the other, are the prompt */
    json_span *span;
    size_t spans, span_room;
    unsigned char *ids; /* token ids, four bytes each; spans of the kind JSON_IDS point in here */
    size_t ids_size, ids_room;
    bs_at body, end;
} bs_result;

/* --- tokens */

static inline bs_at bs_space(bs_at p) {
    while (*p <= ' ' && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

/* What an ASCII character may be: behind a backslash, of \\uXXXX, as it stands. A backslash is plain, too: what it is, the
 * next one says. */
enum { BS_SHORT_ESCAPE = 1, BS_DIGIT = 2, BS_DIGIT_FROM_8 = 4, BS_PLAIN = 8 };
#define BS_HEX (BS_PLAIN | BS_DIGIT)
#define BS_HEX_FROM_8 (BS_HEX | BS_DIGIT_FROM_8)
static const unsigned char bs_class[256] = {
    [' ' ... '!'] = BS_PLAIN, ['"'] = BS_SHORT_ESCAPE, ['#' ... '.'] = BS_PLAIN, ['/'] = BS_PLAIN | BS_SHORT_ESCAPE,
    ['0' ... '7'] = BS_HEX, ['8' ... '9'] = BS_HEX_FROM_8, [':' ... '@'] = BS_PLAIN,
    ['A' ... 'F'] = BS_HEX_FROM_8, ['G' ... '['] = BS_PLAIN, ['\\'] = BS_PLAIN | BS_SHORT_ESCAPE, [']' ... '`'] = BS_PLAIN,
    ['a'] = BS_HEX_FROM_8, ['b'] = BS_HEX_FROM_8 | BS_SHORT_ESCAPE, ['c' ... 'e'] = BS_HEX_FROM_8,
    ['f'] = BS_HEX_FROM_8 | BS_SHORT_ESCAPE, ['g' ... 'm'] = BS_PLAIN, ['n'] = BS_PLAIN | BS_SHORT_ESCAPE,
    ['o' ... 'q'] = BS_PLAIN, ['r'] = BS_PLAIN | BS_SHORT_ESCAPE, ['s'] = BS_PLAIN, ['t'] = BS_PLAIN | BS_SHORT_ESCAPE,
    ['u' ... 0x7F] = BS_PLAIN,
};

static inline int bs_is_short_escape(unsigned char c) { return bs_class[c] & BS_SHORT_ESCAPE; }

/* `p` stands behind the backslash. A \\u takes those with it that follow it at once: they come in crowds. */
static bs_at bs_skip_escape(bs_at p, bs_at end) {
    if (bs_is_short_escape(*p)) return p + 1;
    if (*p != 'u') return NULL;
    for (;;) {
        int code = json_hex4(p + 1, end);
        if (code < 0) return NULL;
        p += 5;
        if (code >= 0xD800 && code <= 0xDFFF) {
            if (code > 0xDBFF || p[0] != '\\' || p[1] != 'u') return NULL;
            code = json_hex4(p + 2, end);
            if (code < 0xDC00 || code > 0xDFFF) return NULL;
            p += 6;
        }
        if (p[0] != '\\' || p[1] != 'u') return p;
        p++;
    }
}

static inline int bs_is_more(unsigned char c) { return (c & 0xC0) == 0x80; }

/* Characters beyond ASCII, one after the other, as RFC 3629 has them. */
static bs_at bs_skip_utf8(bs_at p) {
    while (*p >= 0x80) {
        unsigned char c = p[0];
        if (c >= 0xE0 && c <= 0xEF) {
            unsigned char least = c == 0xE0 ? 0xA0 : 0x80, most = c == 0xED ? 0x9F : 0xBF;
            if (p[1] < least || p[1] > most || !bs_is_more(p[2])) return NULL;
            p += 3;
        } else if (c >= 0xC2 && c <= 0xDF) {
            if (!bs_is_more(p[1])) return NULL;
            p += 2;
        } else if (c >= 0xF0 && c <= 0xF4) {
            unsigned char least = c == 0xF0 ? 0x90 : 0x80, most = c == 0xF4 ? 0x8F : 0xBF;
            if (p[1] < least || p[1] > most || !bs_is_more(p[2]) || !bs_is_more(p[3])) return NULL;
            p += 4;
        } else return NULL;
    }
    return p;
}

#ifdef __SSE2__
/* Bits of the bytes that are no plain text: a quote, a backslash, a control character, anything beyond ASCII. The
 * comparison is signed, so the last two are one. */
static inline __m128i bs_special(const unsigned char *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    __m128i marks = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')), _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\')));
    return _mm_or_si128(marks, _mm_cmplt_epi8(bytes, _mm_set1_epi8(' ')));
}
#endif

/* From `p` on the first byte that is no plain text; escapes of two bytes may have been passed, that is noted. */
static inline bs_at bs_plain(bs_at p, bs_at end, int *has_escapes) {
#ifdef __SSE2__
    if (end - p >= 16) {
        int first = _mm_movemask_epi8(bs_special(p)); /* most strings are keys and roles */
        if (first) return p + __builtin_ctz((unsigned)first);
        p += 16;
    }
    while (end - p >= 64) {
        __m128i a = bs_special(p), b = bs_special(p + 16), c = bs_special(p + 32), d = bs_special(p + 48);
        size_t step = 64;
        if (_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d)))) {
            uint64_t low = (uint32_t)_mm_movemask_epi8(a) | (uint32_t)_mm_movemask_epi8(b) << 16;
            uint64_t high = (uint32_t)_mm_movemask_epi8(c) | (uint32_t)_mm_movemask_epi8(d) << 16;
            uint64_t marks = low | high << 32;
            do { /* line ends and quotes in a text: the way through them is not to be guessed by the CPU each time */
                int at = __builtin_ctzll(marks);
                if (p[at] != '\\' || !bs_is_short_escape(p[at + 1])) return p + at;
                *has_escapes = 1;
                if (at == 63) step = 65;
                marks &= ~((uint64_t)3 << at);
            } while (marks);
        }
        p += step;
    }
    while (end - p >= 16) {
        int marks = _mm_movemask_epi8(bs_special(p));
        if (marks) return p + __builtin_ctz((unsigned)marks);
        p += 16;
    }
#endif
    while (*p >= ' ' && *p < 0x80 && *p != '"' && *p != '\\') p++; /* the NUL behind the end stops it */
    return p;
}

#ifdef JSON_HAS_WIDE
/* What the last bytes of a block of 64 ask of the next one's first, a bit for each. */
typedef struct { uint64_t more, behind_e0, behind_ed, behind_f0, behind_f4; } bs_pending;

/* Of a block the bytes that no UTF-8 has in such a place, as RFC 3629 has it. */
static JSON_WIDE inline uint64_t bs_not_utf8(__m512i block, bs_pending *pending) {
    uint64_t more = _mm512_cmplt_epi8_mask(block, _mm512_set1_epi8(-64)), leads = _mm512_movepi8_mask(block) & ~more;
    uint64_t of_three = _mm512_cmpge_epu8_mask(block, _mm512_set1_epi8((char)0xE0)); /* or four */
    uint64_t of_four = _mm512_cmpge_epu8_mask(block, _mm512_set1_epi8((char)0xF0));
    uint64_t e0 = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8((char)0xE0));
    uint64_t ed = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8((char)0xED));
    uint64_t f0 = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8((char)0xF0));
    uint64_t f4 = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8((char)0xF4));
    uint64_t from_90 = _mm512_cmpge_epu8_mask(block, _mm512_set1_epi8((char)0x90));
    uint64_t from_a0 = _mm512_cmpge_epu8_mask(block, _mm512_set1_epi8((char)0xA0));
    uint64_t wrong = (leads << 1 | of_three << 2 | of_four << 3 | pending->more) ^ more;
    wrong |= _mm512_mask_cmplt_epu8_mask(leads, block, _mm512_set1_epi8((char)0xC2));
    wrong |= _mm512_cmpgt_epu8_mask(block, _mm512_set1_epi8((char)0xF4));
    wrong |= (e0 << 1 | pending->behind_e0) & ~from_a0;
    wrong |= (ed << 1 | pending->behind_ed) & from_a0;
    wrong |= (f0 << 1 | pending->behind_f0) & ~from_90;
    wrong |= (f4 << 1 | pending->behind_f4) & from_90;
    *pending = (bs_pending){leads >> 63 | of_three >> 62 | of_four >> 61, e0 >> 63, ed >> 63, f0 >> 63, f4 >> 63};
    return wrong;
}

/* Of the bytes `unicode` of a block, each the u of a \\uXXXX, those that are to be looked at one by one: without four digits in
 * this block, or of a surrogate. */
static JSON_WIDE inline uint64_t bs_odd_unicode(__m512i block, __m512i class, uint64_t unicode) {
    uint64_t digits = _mm512_test_epi8_mask(class, _mm512_set1_epi8(BS_DIGIT));
    uint64_t from_8 = _mm512_test_epi8_mask(class, _mm512_set1_epi8(BS_DIGIT_FROM_8));
    uint64_t ds = _mm512_cmpeq_epi8_mask(_mm512_or_si512(block, _mm512_set1_epi8(32)), _mm512_set1_epi8('d'));
    return unicode & (~(digits >> 1 & digits >> 2 & digits >> 3 & digits >> 4) | (ds >> 1 & from_8 >> 2));
}

enum { BS_CALM = 0xFF }; /* eight blocks of plain text: more is expected */

/* Passes over plain text, four blocks at a time. */
static JSON_WIDE inline bs_at bs_plain_wide(bs_at p, bs_at end) {
    const __m512i quote = _mm512_set1_epi8('"'), backslash = _mm512_set1_epi8('\\'), space = _mm512_set1_epi8(' ');
    for (; end - p >= 256; p += 256) {
        __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
        __m512i c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
        __m512i least = _mm512_min_epi8(_mm512_min_epi8(a, b), _mm512_min_epi8(c, d)); /* signed: beyond ASCII is less, too */
        __mmask64 special = _mm512_cmplt_epi8_mask(least, space);
        special |= _mm512_cmpeq_epi8_mask(a, quote) | _mm512_cmpeq_epi8_mask(a, backslash);
        special |= _mm512_cmpeq_epi8_mask(b, quote) | _mm512_cmpeq_epi8_mask(b, backslash);
        special |= _mm512_cmpeq_epi8_mask(c, quote) | _mm512_cmpeq_epi8_mask(c, backslash);
        special |= _mm512_cmpeq_epi8_mask(d, quote) | _mm512_cmpeq_epi8_mask(d, backslash);
        if (special) break;
    }
    return p;
}

/* As `bs_skip_inside`. */
static JSON_WIDE bs_at bs_skip_inside_wide(bs_at p, bs_at end, int *has_escapes) {
    const __m512i low = _mm512_loadu_si512(bs_class), high = _mm512_loadu_si512(bs_class + 64);
    const __m512i plain = _mm512_set1_epi8(BS_PLAIN), short_escape = _mm512_set1_epi8(BS_SHORT_ESCAPE);
    uint64_t is_first_escaped = 0, backslashes_seen = 0;
    bs_pending pending = {0};
    uint32_t history = BS_CALM & ~(BS_CALM >> 2); /* a bit for a block, 1 = it had more than plain text; bit 0 is the last */
    for (;;) {
        __m512i block;
        if (end - p >= 64) block = _mm512_loadu_si512(p);
        else block = _mm512_maskz_loadu_epi8(_bzhi_u64(UINT64_MAX, (unsigned)(end - p)), p); /* NUL behind the end */
        uint64_t backslashes = _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8('\\'));
        uint64_t escaped = json_escaped(backslashes, &is_first_escaped);
        uint64_t beyond_ascii = _mm512_movepi8_mask(block);
        __m512i class = _mm512_maskz_permutex2var_epi8(~beyond_ascii, low, block, high); /* beyond ASCII: nothing */
        uint64_t stops = _mm512_testn_epi8_mask(class, _mm512_mask_blend_epi8(escaped, plain, short_escape));
        if (stops | pending.more) {
            uint64_t unicode = _mm512_mask_cmpeq_epi8_mask(escaped, block, _mm512_set1_epi8('u'));
            stops &= escaped | ~beyond_ascii;
            if (unicode) stops ^= unicode ^ bs_odd_unicode(block, class, unicode);
            /* Up to the first stop, which may not be inside of a character. */
            if ((beyond_ascii | pending.more) && bs_not_utf8(block, &pending) & (stops ^ (stops - 1))) return NULL;
        }
        if (!stops) {
            backslashes_seen |= backslashes;
            p += 64;
            history = history << 1 | ((backslashes | beyond_ascii) != 0);
            if (!(history & BS_CALM)) {
                p = bs_plain_wide(p, end);
                history = BS_CALM;
            }
            continue;
        }
        unsigned stop = (unsigned)__builtin_ctzll(stops);
        backslashes_seen |= _bzhi_u64(backslashes, stop);
        p += stop;
        if (!(escaped >> stop & 1)) {
            *has_escapes |= backslashes_seen != 0;
            return *p == '"' ? p : NULL;
        }
        if (*p != 'u') return NULL;
        if (stop >= 60) p--; /* its digits are in the next block: once more, from its backslash on */
        else if (!(p = bs_skip_escape(p, end))) return NULL;
        is_first_escaped = 0;
        pending = (bs_pending){0};
    }
}
#endif

/* `p` stands behind the opening quote; returns the closing one. */
static inline bs_at bs_skip_inside(bs_at p, bs_at end, int *has_escapes) {
#ifdef JSON_HAS_WIDE
    if (json_is_wide) {
        if (end - p >= 16) { /* most strings are keys and roles */
            int first = _mm_movemask_epi8(bs_special(p));
            p += first ? __builtin_ctz((unsigned)first) : 16;
            if (*p == '"') return p;
        }
        return bs_skip_inside_wide(p, end, has_escapes);
    }
#endif
    for (;;) {
        p = bs_plain(p, end, has_escapes);
        if (*p == '"') return p;
        if (*p == '\\') {
            *has_escapes = 1;
            p = bs_skip_escape(p + 1, end);
        } else p = *p >= 0x80 ? bs_skip_utf8(p) : NULL;
        if (!p) return NULL;
    }
}

static inline bs_at bs_skip_string(bs_at p, bs_at end) {
    int ignored = 0;
    p = bs_skip_inside(p + 1, end, &ignored);
    return p ? p + 1 : NULL;
}

static inline int bs_is_digit(unsigned char c) { return (unsigned char)(c - '0') < 10; }

static bs_at bs_skip_number(bs_at p) {
    bs_at start = p;
    if (*p == '-') p++;
    if (*p == '0') p++;
    else if (bs_is_digit(*p)) while (bs_is_digit(*p)) p++;
    else return NULL;
    if (*p == '.') {
        if (!bs_is_digit(*++p)) return NULL;
        while (bs_is_digit(*p)) p++;
    }
    if ((*p | 32) == 'e') {
        p++;
        if (*p == '+' || *p == '-') p++;
        bs_at digits = p;
        while (bs_is_digit(*p)) p++;
        if (p == digits || p - digits > 2) return NULL;
    }
    return p - start <= BS_MAX_NUMBER ? p : NULL;
}

static inline bs_at bs_skip_word(bs_at p, bs_at end, const char *word, size_t size) {
    return (size_t)(end - p) >= size && !memcmp(p, word, size) ? p + size : NULL;
}

/* Any value; `depth` is that of what is around it. Without recursion: what is open is a stack of bits. */
static bs_at bs_skip_value(bs_at p, bs_at end, int depth) {
    uint64_t is_object = 0;
    int outside = depth;
value:
    switch (*p) {
    case '"': p = bs_skip_string(p, end); break;
    case '{': case '[':
        if (++depth > BS_MAX_DEPTH) return NULL;
        is_object = is_object << 1 | (*p == '{');
        p = bs_space(p + 1);
        if (*p == (is_object & 1 ? '}' : ']')) goto close;
        if (is_object & 1) goto key;
        goto value;
    case 't': p = bs_skip_word(p, end, "true", 4); break;
    case 'f': p = bs_skip_word(p, end, "false", 5); break;
    case 'n': p = bs_skip_word(p, end, "null", 4); break;
    default: p = bs_skip_number(p);
    }
    if (!p) return NULL;
behind:
    if (depth == outside) return p;
    p = bs_space(p);
    if (*p == ',') {
        p = bs_space(p + 1);
        if (is_object & 1) goto key;
        goto value;
    }
    if (*p != (is_object & 1 ? '}' : ']')) return NULL;
close:
    p++;
    is_object >>= 1;
    depth--;
    goto behind;
key:
    if (*p != '"' || !(p = bs_skip_string(p, end))) return NULL;
    p = bs_space(p);
    if (*p != ':') return NULL;
    p = bs_space(p + 1);
    goto value;
}

/* --- members and items: for loops over an object or an array
 *
 *     for (p = bs_first(p, '}', &more); more; p = bs_next(p, '}', &more)) {
 *         if (!(p = bs_key(p, end, &key))) return NULL;
 *         p = ... behind the value, or NULL
 *     }
 *     behind the object, or NULL
 */

/* `p` stands at the opening bracket. */
static inline bs_at bs_first(bs_at p, unsigned char closing, int *more) {
    p = bs_space(p + 1);
    *more = *p != closing;
    return *more ? p : p + 1;
}

/* `p` stands behind a value, or is NULL. */
static inline bs_at bs_next(bs_at p, unsigned char closing, int *more) {
    *more = 0;
    if (!p) return NULL;
    p = bs_space(p);
    if (*p == closing) return p + 1;
    if (*p != ',') return NULL;
    *more = 1;
    return bs_space(p + 1);
}

/* `p` moves to the value. A key with an escape might be any. */
static inline bs_at bs_key(bs_at p, bs_at end, bs_text *key) {
    int has_escapes = 0;
    if (*p != '"') return NULL;
    key->p = p + 1;
    p = bs_skip_inside(p + 1, end, &has_escapes);
    if (!p || has_escapes) return NULL;
    key->size = (size_t)(p - key->p);
    p = bs_space(p + 1);
    return *p == ':' ? bs_space(p + 1) : NULL;
}

#define bs_is(text, name) ((text).size == sizeof(name) - 1 && !memcmp((text).p, name, sizeof(name) - 1))

/* --- the prompt */

static int bs_add(bs_result *out, size_t at, size_t size, int kind) {
    if (out->spans == out->span_room) {
        size_t room = out->span_room ? 2 * out->span_room : 64;
        json_span *grown = room > BS_MAX_SPANS ? NULL : realloc(out->span, room * sizeof(json_span));
        if (!grown) return 0;
        out->span = grown;
        out->span_room = room;
    }
    json_span *span = &out->span[out->spans++];
    span->at = at;
    span->size = size;
    span->kind = kind;
    return 1;
}

/* A string as text, anything else as it stands. */
static bs_at bs_add_value(bs_result *out, bs_at p, int depth) {
    bs_at start = p;
    int has_escapes = 0, kind = JSON_RAW;
    if (*p == '"') {
        p = bs_skip_inside(p + 1, out->end, &has_escapes);
        if (p) p++;
        kind = has_escapes ? JSON_ESCAPED : JSON_TEXT;
    } else p = bs_skip_value(p, out->end, depth);
    return p && bs_add(out, (size_t)(start - out->body), (size_t)(p - start), kind) ? p : NULL;
}

/* A part of a message: its text if it is an object that has one, else as it stands. */
static bs_at bs_add_part(bs_result *out, bs_at p, int depth) {
    bs_at start = p;
    int more, has_text = 0;
    bs_text key;
    if (*p != '{') return bs_add_value(out, p, depth);
    for (p = bs_first(p, '}', &more); more; p = bs_next(p, '}', &more)) {
        if (!(p = bs_key(p, out->end, &key))) return NULL;
        if (!bs_is(key, "text")) p = bs_skip_value(p, out->end, depth + 1);
        else if (has_text) return NULL;
        else {
            has_text = 1;
            p = bs_add_value(out, p, depth + 1);
        }
    }
    if (!p || has_text) return p;
    return bs_add(out, (size_t)(start - out->body), (size_t)(p - start), JSON_RAW) ? p : NULL;
}

/* A string, or parts; null is nothing. */
static bs_at bs_add_content(bs_result *out, bs_at p, int depth) {
    int more;
    if (*p == 'n') return bs_skip_value(p, out->end, depth);
    if (*p != '[') return bs_add_value(out, p, depth);
    for (p = bs_first(p, ']', &more); more; p = bs_next(p, ']', &more)) p = bs_add_part(out, p, depth + 1);
    return p;
}

/* Content, and behind it the calls of tools, in whatever order they stand. `is_item`: of the Responses API, where an
 * object without either counts as it stands. */
static bs_at bs_add_message(bs_result *out, bs_at p, int depth, int is_item) {
    bs_at start = p;
    int more, has_content = 0;
    bs_text key, calls = {NULL, 0};
    if (*p != '{') return NULL;
    for (p = bs_first(p, '}', &more); more; p = bs_next(p, '}', &more)) {
        if (!(p = bs_key(p, out->end, &key))) return NULL;
        if (bs_is(key, "content")) {
            if (has_content) return NULL;
            has_content = 1;
            p = bs_add_content(out, p, depth + 1);
        } else if (bs_is(key, "tool_calls")) {
            if (calls.p) return NULL;
            calls.p = p;
            p = bs_skip_value(p, out->end, depth + 1);
            if (p) calls.size = (size_t)(p - calls.p);
        } else p = bs_skip_value(p, out->end, depth + 1);
    }
    if (!p) return NULL;
    if (calls.p && *calls.p == '"') return bs_add_value(out, calls.p, depth + 1) ? p : NULL; /* has it escapes? */
    if (calls.p) return bs_add(out, (size_t)(calls.p - out->body), calls.size, JSON_RAW) ? p : NULL;
    if (has_content || !is_item) return p;
    return bs_add(out, (size_t)(start - out->body), (size_t)(p - start), JSON_RAW) ? p : NULL;
}

static bs_at bs_add_messages(bs_result *out, bs_at p, int depth) {
    int more;
    if (*p != '[') return NULL;
    for (p = bs_first(p, ']', &more); more; p = bs_next(p, ']', &more)) p = bs_add_message(out, p, depth + 1, 0);
    return p;
}

/* `p` stands at the opening bracket of a list of token ids. */
static bs_at bs_add_ids(bs_result *out, bs_at p) {
    int more;
    size_t start = out->ids_size;
    for (p = bs_first(p, ']', &more); more; p = bs_next(p, ']', &more)) {
        uint64_t id = 0;
        bs_at first = p;
        while (bs_is_digit(*p) && p - first < 11) id = id * 10 + (*p++ - '0');
        if (p == first || id > INT32_MAX || (*first == '0' && p - first > 1)) return NULL;
        if (out->ids_room - out->ids_size < 4) {
            size_t room = out->ids_room ? 2 * out->ids_room : 4096;
            unsigned char *grown = realloc(out->ids, room);
            if (!grown) return NULL;
            out->ids = grown;
            out->ids_room = room;
        }
        int32_t token = (int32_t)id;
        memcpy(out->ids + out->ids_size, &token, 4);
        out->ids_size += 4;
    }
    return p && bs_add(out, start, out->ids_size - start, JSON_IDS) ? p : NULL;
}

/* A string, token ids, or a list of either, or items of the Responses API. */
static bs_at bs_add_prompt(bs_result *out, bs_at p, int depth) {
    int more;
    if (*p != '[') return bs_add_content(out, p, depth);
    bs_at inside = bs_space(p + 1);
    if (bs_is_digit(*inside)) return bs_add_ids(out, p);
    for (p = bs_first(p, ']', &more); more; p = bs_next(p, ']', &more)) {
        if (*p == '{') p = bs_add_message(out, p, depth + 1, 1);
        else if (*p == '"') p = bs_add_value(out, p, depth + 1);
        else if (*p == '[') p = bs_add_ids(out, p);
        else return NULL;
    }
    return p;
}

/* --- the other fields */

/* A name that needs nothing resolved; what is no string is no name. */
static bs_at bs_read_name(bs_result *out, bs_at p, bs_text *name) {
    int has_escapes = 0;
    if (*p == '{' || *p == '[') return NULL;
    if (*p != '"') return bs_skip_value(p, out->end, 1);
    name->p = p + 1;
    p = bs_skip_inside(p + 1, out->end, &has_escapes);
    if (!p || has_escapes || p - name->p > BS_MAX_NAME) return NULL;
    name->size = (size_t)(p - name->p);
    return p + 1;
}

/* A count of tokens: -1 for null or a string. Whatever else is no plain count is for others to judge. */
static bs_at bs_read_count(bs_result *out, bs_at p, int64_t *count, int *is_null) {
    *is_null = *p == 'n';
    *count = -1;
    if (*p == 'n' || *p == '"') return bs_skip_value(p, out->end, 1);
    bs_at first = p;
    int64_t value = 0;
    while (bs_is_digit(*p) && p - first < BS_MAX_INTEGER) value = value * 10 + (*p++ - '0');
    if (p == first || (*first == '0' && p - first > 1)) return NULL;
    if (bs_is_digit(*p) || *p == '.' || *p == 'e' || *p == 'E') return NULL;
    *count = value;
    return p;
}

/* SGLang's: only max_new_tokens is of interest. */
static bs_at bs_read_sampling(bs_result *out, bs_at p, int64_t *most) {
    int more, is_null, is_seen = 0;
    bs_text key;
    if (*p != '{') return bs_skip_value(p, out->end, 1);
    for (p = bs_first(p, '}', &more); more; p = bs_next(p, '}', &more)) {
        if (!(p = bs_key(p, out->end, &key))) return NULL;
        if (!bs_is(key, "max_new_tokens")) p = bs_skip_value(p, out->end, 2);
        else if (is_seen) return NULL;
        else {
            is_seen = 1;
            p = bs_read_count(out, p, most, &is_null);
        }
    }
    return p;
}

/* --- the whole */

enum {
    BS_MODEL, BS_STREAM, BS_LORA, BS_RID, BS_MAX_TOKENS, BS_MAX_COMPLETION_TOKENS, BS_SAMPLING_PARAMS,
    BS_SYSTEM, BS_INSTRUCTIONS, BS_MESSAGES, BS_PROMPT, BS_TEXT, BS_INPUT_IDS, BS_INPUT, BS_FIELDS,
    BS_OTHER = BS_FIELDS,
};

static inline int bs_field(bs_text key) {
    switch (key.size) {
    case 3: return bs_is(key, "rid") ? BS_RID : BS_OTHER;
    case 4: return bs_is(key, "text") ? BS_TEXT : BS_OTHER;
    case 5: return bs_is(key, "model") ? BS_MODEL : bs_is(key, "input") ? BS_INPUT : BS_OTHER;
    case 6:
        return bs_is(key, "stream") ? BS_STREAM : bs_is(key, "prompt") ? BS_PROMPT
             : bs_is(key, "system") ? BS_SYSTEM : BS_OTHER;
    case 8: return bs_is(key, "messages") ? BS_MESSAGES : BS_OTHER;
    case 9: return bs_is(key, "input_ids") ? BS_INPUT_IDS : bs_is(key, "lora_path") ? BS_LORA : BS_OTHER;
    case 10: return bs_is(key, "max_tokens") ? BS_MAX_TOKENS : BS_OTHER;
    case 12: return bs_is(key, "instructions") ? BS_INSTRUCTIONS : BS_OTHER;
    case 15: return bs_is(key, "sampling_params") ? BS_SAMPLING_PARAMS : BS_OTHER;
    case 21: return bs_is(key, "max_completion_tokens") ? BS_MAX_COMPLETION_TOKENS : BS_OTHER;
    default: return BS_OTHER;
    }
}

/* 1 = certain: `out` has it all. 0 = it is not, and `out` has nothing of use. `body[size]` must be NUL. */
static int bs_scan(bs_result *out, bs_at body, size_t size) {
    bs_at p = bs_space(body), end = body + size;
    bs_range range[BS_FIELDS];
    bs_text key, none = {NULL, 0};
    int64_t most = -1, completion = -1, sampling = -1;
    int more, is_null, has_most = 0, has_completion = 0;
    uint32_t seen = 0;
    out->model = out->lora = out->rid = none;
    out->is_stream = 0;
    out->spans = out->ids_size = 0;
    out->body = body;
    out->end = end;
    if (*p != '{') return 0;
    for (p = bs_first(p, '}', &more); more; p = bs_next(p, '}', &more)) {
        if (!(p = bs_key(p, end, &key))) return 0;
        int field = bs_field(key);
        if (field == BS_OTHER) {
            p = bs_skip_value(p, end, 1);
            continue;
        }
        if (seen & 1u << field) return 0;
        seen |= 1u << field;
        range[field].first = out->spans;
        switch (field) {
        case BS_MODEL: p = bs_read_name(out, p, &out->model); break;
        case BS_LORA: p = bs_read_name(out, p, &out->lora); break;
        case BS_STREAM:
            if (*p == '{' || *p == '[') return 0;
            out->is_stream = *p == 't';
            p = bs_skip_value(p, end, 1);
            break;
        case BS_RID: {
            bs_at start = p;
            p = bs_skip_value(p, end, 1);
            if (p && *start == '"') {
                out->rid.p = start;
                out->rid.size = (size_t)(p - start);
            }
            break;
        }
        case BS_MAX_TOKENS:
            p = bs_read_count(out, p, &most, &is_null);
            has_most = !is_null;
            break;
        case BS_MAX_COMPLETION_TOKENS:
            p = bs_read_count(out, p, &completion, &is_null);
            has_completion = !is_null;
            break;
        case BS_SAMPLING_PARAMS: p = bs_read_sampling(out, p, &sampling); break;
        case BS_SYSTEM: case BS_INSTRUCTIONS: p = bs_add_content(out, p, 1); break;
        case BS_MESSAGES:
            if (*p == 'n') {
                seen &= ~(1u << field); /* as if it were not there; said twice, it is only nothing twice */
                p = bs_skip_value(p, end, 1);
            } else p = bs_add_messages(out, p, 1);
            break;
        default: p = bs_add_prompt(out, p, 1);
        }
        range[field].end = out->spans;
    }
    if (!p || bs_space(p) != end) return 0;
    out->max_tokens = has_completion ? completion : has_most ? most : sampling;
    memset(out->part, 0, sizeof(out->part));
    if (seen & 1u << BS_SYSTEM) out->part[0] = range[BS_SYSTEM];
    if (seen & 1u << BS_INSTRUCTIONS) out->part[1] = range[BS_INSTRUCTIONS];
    for (int field = BS_MESSAGES; field <= BS_INPUT; field++) {
        if (seen & 1u << field) {
            out->part[2] = range[field];
            break;
        }
    }
    return 1;
}

/* After a scan: what an unusual body took is given back. */
static inline void bs_trim(bs_result *out) {
    if (out->span_room > 4096) {
        free(out->span);
        out->span = NULL;
        out->span_room = 0;
    }
    if (out->ids_room > 1 << 20) {
        free(out->ids);
        out->ids = NULL;
        out->ids_room = 0;
    }
}

#endif
