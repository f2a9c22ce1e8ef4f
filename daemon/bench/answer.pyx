"""One HTTP answer as a client reads it: where it ends, when its tokens came, what is wrong with it.

Theory of operation. Bytes go through two machines. The outer one finds the head, and the end of the message by
Content-Length, chunks or the end of the connection. What is content goes on: into `body`, or, of an event stream that was asked
for, line by line into the inner one. That looks at events without parsing them: whether they are objects, errors or
`[DONE]`, whether they hold text (a non-empty string behind a key that ends with `content`, `text` or `arguments`), and
which one tells usage. A model's own text cannot be taken for such a key, because its quotes are escaped.

The first thing that is wrong is kept in `problem`; after it nothing is read any more.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy

from pointsman.daemon.bench.histogram cimport Histogram

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <string.h>
    #include <strings.h>
    """
    void *memmem(const void *haystack, size_t n, const void *needle, size_t m) nogil
    int strncasecmp(const char *a, const char *b, size_t n) nogil

cdef enum:
    MOST_HEAD = 1 << 16
    MOST_LINE = 1 << 25
    MOST_SIZE_DIGITS = 12


cdef inline int _hex(char c) noexcept nogil:
    if c'0' <= c <= c'9':
        return c - c'0'
    c |= 0x20
    return c - c'a' + 10 if c'a' <= c <= c'f' else -1


cdef inline bint _holds_text(const char *p, const char *end, const char *key, size_t size) noexcept nogil:
    """Whether a non-empty string follows one of the keys that end with `key` (its quote and colon included)."""
    cdef const char *at = p
    while True:
        at = <const char *> memmem(at, end - at, key, size)
        if at == NULL:
            return False
        at += size
        if at < end and at[0] == c' ':
            at += 1
        if end - at >= 2 and at[0] == c'"' and at[1] != c'"':
            return True


cdef inline const char *_value(const char *p, const char *end, const char *key, size_t size) noexcept nogil:
    """The first byte of the value behind the last `key`; NULL without one."""
    cdef const char *at = p
    cdef const char *found = NULL
    while True:
        at = <const char *> memmem(at, end - at, key, size)
        if at == NULL:
            return found
        at += size
        if at < end and at[0] == c' ':
            at += 1
        if at < end:
            found = at


cdef class Answer:
    """Reads one answer after the other; `expect` begins each. Times are those that `feed` was given."""

    def __init__(self, tuple worker_headers=()):
        """`worker_headers`: lower case, the first one that an answer has names the worker."""
        self._worker_headers = worker_headers
        self._line = NULL
        self._state = COMPLETE
        self._parts = []

    def __dealloc__(self):
        free(self._line)

    @property
    def is_complete(self):
        return self._state == COMPLETE

    @property
    def body(self):
        return b"".join(self._parts)

    def expect(self, bint is_stream, Histogram gaps not None):
        """`gaps` records the times between tokens."""
        self.status = 0
        self.problem = self.worker = self.told = self.error = None
        self.keeps_alive = True
        self.is_event_stream = self.has_done = self.has_finished = False
        self.received = self.events = self.texts = 0
        self.first_text_ns = self.last_text_ns = 0
        self._state = HEAD
        self._wants_stream = is_stream
        self._is_error_event = False
        self._head = b""
        self._parts = []
        self._gaps = gaps
        self._line_bytes = 0

    cpdef bint feed(self, bytes data, int64_t now_ns) except -1:
        """True: the answer has ended, well or with a problem."""
        cdef const char *p = PyBytes_AS_STRING(data)
        cdef const char *end = p + PyBytes_GET_SIZE(data)
        self.received += end - p
        self._now_ns = now_ns
        if self._state == HEAD:
            p = self._read_head(data)
            if p == NULL:
                return self._state == BROKEN
            if self._head:  # what was joined, not `data`, holds the rest
                end = PyBytes_AS_STRING(self._head) + PyBytes_GET_SIZE(self._head)
        while p < end and self._state < COMPLETE:
            p = self._read_body(p, end)
        if self._state == COMPLETE and p < end:
            self._fail("extra_bytes")
        return self._state >= COMPLETE

    def end_of_input(self):
        """The connection has ended; True when the answer may end with it."""
        if self._state == BY_CLOSE:
            self._state = COMPLETE
            self.keeps_alive = False
        return self._state == COMPLETE

    cdef const char *_fail(self, str problem) except? NULL:
        if self.problem is None:
            self.problem = problem
        self._state = BROKEN
        self.keeps_alive = False
        return NULL

    # --- the message

    cdef const char *_read_head(self, bytes data) except? NULL:
        """The first byte behind the head; NULL when there is none yet. Leaves in `_head` what that byte is part of, if
        it is not `data`."""
        cdef const char *start
        cdef const char *end
        cdef const char *blank
        cdef bytes whole = self._head + data if self._head else data
        while True:
            start = PyBytes_AS_STRING(whole)
            end = start + PyBytes_GET_SIZE(whole)
            blank = <const char *> memmem(start, end - start, b"\r\n\r\n", 4)
            if blank == NULL:
                if end - start > MOST_HEAD:
                    return self._fail("malformed_http")
                self._head = whole
                return NULL
            self._parse_head(start, blank + 2)
            if self._state == BROKEN:
                return NULL
            if 100 <= self.status < 200 and self.status != 101:  # an interim answer
                whole = whole[blank + 4 - start:]
                self._state = HEAD
                continue
            self._head = b"" if whole is data else whole
            return blank + 4

    cdef int _parse_head(self, const char *p, const char *end) except -1:
        """`end` is behind the CRLF of the last line."""
        cdef const char *eol
        cdef const char *colon
        cdef int64_t length = -1
        cdef bint is_chunked = False
        cdef bint is_old
        cdef Py_ssize_t rank = len(self._worker_headers)
        if end - p < 14 or memcmp(p, b"HTTP/1.", 7) != 0 or p[8] != c' ':
            self._fail("malformed_http")
            return 0
        is_old = p[7] == c'0'
        self.keeps_alive = not is_old
        self.status = 0
        for i in range(9, 12):
            if not c'0' <= p[i] <= c'9':
                self._fail("malformed_http")
                return 0
            self.status = self.status * 10 + p[i] - c'0'
        self.is_event_stream = False
        p = <const char *> memchr(p, c'\n', end - p) + 1
        while p < end:
            eol = <const char *> memmem(p, end - p, b"\r\n", 2)
            colon = <const char *> memchr(p, c':', eol - p)
            if colon == NULL or colon == p:
                self._fail("malformed_http")
                return 0
            name_bytes = colon - p
            colon += 1
            while colon < eol and (colon[0] == c' ' or colon[0] == c'\t'):
                colon += 1
            if name_bytes == 14 and strncasecmp(p, b"content-length", 14) == 0:
                value = PyBytes_FromStringAndSize(colon, eol - colon).strip()
                if not value.isdigit() or len(value) > 15 or (length >= 0 and length != int(value)):
                    self._fail("malformed_http")
                    return 0
                length = int(value)
            elif name_bytes == 17 and strncasecmp(p, b"transfer-encoding", 17) == 0:
                is_chunked = eol - colon >= 7 and strncasecmp(eol - 7, b"chunked", 7) == 0
            elif name_bytes == 10 and strncasecmp(p, b"connection", 10) == 0:
                value = PyBytes_FromStringAndSize(colon, eol - colon).lower()
                self.keeps_alive = b"keep-alive" in value or (not is_old and b"close" not in value)
            elif name_bytes == 12 and strncasecmp(p, b"content-type", 12) == 0:
                self.is_event_stream = eol - colon >= 17 and strncasecmp(colon, b"text/event-stream", 17) == 0
            elif rank:
                name = PyBytes_FromStringAndSize(p, name_bytes).lower()
                for i in range(rank):
                    if name == self._worker_headers[i]:
                        self.worker = PyBytes_FromStringAndSize(colon, eol - colon).strip()
                        rank = i
                        break
            p = eol + 2
        if is_chunked:
            self._begin_chunk()
        elif length >= 0:
            self._left = length
            self._state = BY_LENGTH if length else COMPLETE
        elif self.status == 204 or self.status == 304:
            self._state = COMPLETE
        else:
            self._state = BY_CLOSE
        return 0

    cdef void _begin_chunk(self) noexcept:
        self._left = 0
        self._digits = 0
        self._state = CHUNK_SIZE

    cdef const char *_read_body(self, const char *p, const char *end) except? NULL:
        cdef int64_t count
        cdef int digit
        if self._state == CHUNK_DATA or self._state == BY_LENGTH:
            count = min(self._left, <int64_t> (end - p))
            self._left -= count
            self._content(p, count)
            if self._left == 0 and self._state != BROKEN:
                self._state = COMPLETE if self._state == BY_LENGTH else CHUNK_END_CR
            return p + count
        if self._state == BY_CLOSE:
            self._content(p, end - p)
            return end
        if self._state == CHUNK_SIZE:
            digit = _hex(p[0])
            if digit >= 0 and self._digits < MOST_SIZE_DIGITS:
                self._left = self._left * 16 + digit
                self._digits += 1
                return p + 1
            if self._digits == 0 or digit >= 0:
                return self._fail("malformed_http")
            self._state = CHUNK_EXTENSION
            return p
        if self._state == CHUNK_EXTENSION:
            if p[0] == c'\n':
                return self._fail("malformed_http")
            if p[0] == c'\r':
                self._state = CHUNK_LF
            return p + 1
        if self._state == TRAILER:
            if p[0] == c'\n':
                if self._trailer_bytes == 0:
                    self._state = COMPLETE
                self._trailer_bytes = 0
            elif p[0] != c'\r':
                self._trailer_bytes += 1
            return p + 1
        if self._state == CHUNK_END_CR:
            if p[0] != c'\r':
                return self._fail("malformed_http")
            self._state = CHUNK_END_LF
            return p + 1
        if p[0] != c'\n':
            return self._fail("malformed_http")
        if self._state == CHUNK_END_LF:
            self._begin_chunk()
        elif self._left:
            self._state = CHUNK_DATA
        else:
            self._trailer_bytes = 0
            self._state = TRAILER
        return p + 1

    cdef int _content(self, const char *p, Py_ssize_t count) except -1:
        if self._wants_stream and self.is_event_stream and self.status == 200:
            return self._read_lines(p, p + count)
        self._parts.append(PyBytes_FromStringAndSize(p, count))
        return 0

    # --- the event stream

    cdef int _read_lines(self, const char *p, const char *end) except -1:
        cdef const char *eol
        while p < end and self._state != BROKEN:
            eol = <const char *> memchr(p, c'\n', end - p)
            if eol == NULL:
                return self._keep(p, end - p)
            if self._line_bytes:
                self._keep(p, eol - p)
                self._read_line(self._line, self._line + self._line_bytes)
                self._line_bytes = 0
            else:
                self._read_line(p, eol)
            p = eol + 1
        return 0

    cdef int _keep(self, const char *p, Py_ssize_t count) except -1:
        cdef Py_ssize_t needed = self._line_bytes + count
        cdef char *larger
        if needed > MOST_LINE:
            self._fail("malformed_event")
            return 0
        if needed > self._line_room:
            larger = <char *> realloc(self._line, 2 * needed)
            if larger == NULL:
                raise MemoryError
            self._line, self._line_room = larger, 2 * needed
        memcpy(self._line + self._line_bytes, p, count)
        self._line_bytes = needed
        return 0

    cdef int _read_line(self, const char *p, const char *end) except -1:
        if p < end and (end - 1)[0] == c'\r':
            end -= 1
        if p == end:
            self._is_error_event = False
        elif p[0] == c':':  # a comment
            pass
        elif end - p >= 5 and memcmp(p, b"data:", 5) == 0:
            p += 5
            if p < end and p[0] == c' ':
                p += 1
            self._read_event(p, end)
        elif end - p >= 6 and memcmp(p, b"event:", 6) == 0:
            self._is_error_event = PyBytes_FromStringAndSize(p + 6, end - p - 6).strip() == b"error"
        elif not ((end - p >= 3 and memcmp(p, b"id:", 3) == 0) or (end - p >= 6 and memcmp(p, b"retry:", 6) == 0)):
            self._fail("malformed_event")
        return 0

    cdef int _read_event(self, const char *p, const char *end) except -1:
        cdef const char *value
        if self.has_done:
            self._fail("after_done")
            return 0
        if end - p == 6 and memcmp(p, b"[DONE]", 6) == 0:
            self.has_done = True
            return 0
        if end - p < 2 or p[0] != c'{' or (end - 1)[0] != c'}':
            self._fail("malformed_event")
            return 0
        self.events += 1
        if self._is_error_event or (end - p > 9 and memcmp(p, b'{"error":', 9) == 0):
            self.error = PyBytes_FromStringAndSize(p, end - p)
            self._fail("stream_error")
            return 0
        if (
            _holds_text(p, end, b'content":', 9)
            or _holds_text(p, end, b'text":', 6)
            or _holds_text(p, end, b'arguments":', 11)
        ):
            self._note_text()
        value = _value(p, end, b'"finish_reason":', 16)
        if value != NULL and value[0] != c'n':
            self.has_finished = True
        value = _value(p, end, b'"usage":', 8)
        if value == NULL:
            value = _value(p, end, b'"meta_info":', 12)
        if value != NULL and value[0] == c'{':
            self.told = PyBytes_FromStringAndSize(p, end - p)
        return 0

    cdef void _note_text(self) noexcept:
        if self.texts:
            self._gaps.record(self._now_ns - self.last_text_ns)
        else:
            self.first_text_ns = self._now_ns
        self.last_text_ns = self._now_ns
        self.texts += 1
