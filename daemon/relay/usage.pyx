"""The token counts that pass by in an answer: OpenAI's and SGLang's names, and those of Messages and Responses.

Looked for in the bytes, without a parser: a count is a key that ends in `_tokens` and a number behind it. Text that a
model writes cannot be taken for one, since its quotes are escaped inside a JSON string.
"""
cimport cython
from libc.string cimport memchr, memcmp

CARRY_BYTES = 1024
"""Of a piece that was read before: a usage object that was cut in two is in this much and the next piece."""

cdef enum:
    NEEDLE = 8
    MOST_DIGITS = 9


@cython.freelist(64)
cdef class Usage:
    """None where the engine does not tell."""

    def __repr__(self):
        return f"Usage({self.output_tokens}, {self.prompt_tokens}, {self.cached_tokens})"


NO_USAGE = Usage()


cdef const char *_next_count(const char *p, const char *end) noexcept:
    """Where the next `_tokens"` begins, NULL: nowhere. Underscores are rare in text: to look for them takes a tenth of
    what memmem takes."""
    cdef const char *last = end - NEEDLE
    while p <= last:
        p = <const char *> memchr(p, c'_', last + 1 - p)
        if p == NULL or memcmp(p + 1, b'tokens"', NEEDLE - 1) == 0:
            return p
        p += 1
    return NULL


cpdef bint holds_counts(bytes data) noexcept:
    """Whether this piece of an answer may hold a count. (`in` of two bytes objects first raises and drops an error.)"""
    return counts_in(<const char *> data, len(data))


cdef bint counts_in(const char *data, size_t size) noexcept:
    return _next_count(data, data + size) != NULL


cdef inline bint _is(const char *end, size_t room, const char *name, size_t size) noexcept:
    """Whether what ends before `_tokens` is `"name`."""
    return room > size and memcmp(end - size, name, size) == 0 and end[-<ssize_t> size - 1] == c'"'


cpdef Usage read_usage(bytes data):
    """From the last piece of an answer that holds counts; of several the last ones stand."""
    cdef const char *start = <const char *> data
    cdef const char *end = start + len(data)
    cdef const char *at = start
    cdef const char *p
    cdef size_t room
    cdef long value
    cdef int digits
    cdef Usage found
    if at == end:
        return NO_USAGE
    found = Usage()
    while True:
        at = _next_count(at, end)
        if at == NULL:
            return found
        p, room = at + NEEDLE, at - start
        while p < end and (p[0] == c' ' or p[0] == c':'):
            p += 1
        value, digits = 0, 0
        while p < end and digits < MOST_DIGITS and c'0' <= p[0] <= c'9':
            value = value * 10 + p[0] - c'0'
            digits += 1
            p += 1
        if digits:
            if _is(at, room, b"completion", 10) or _is(at, room, b"output", 6):
                found.output_tokens = value
            elif _is(at, room, b"prompt", 6) or _is(at, room, b"input", 5):
                found.prompt_tokens = value
            elif _is(at, room, b"cached", 6) or _is(at, room, b"cache_read_input", 16):
                found.cached_tokens = value
        at += NEEDLE
