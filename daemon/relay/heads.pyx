"""Message heads: what a worker answered, and the heads that we send to workers and clients.

Framing headers are never forwarded: they are rebuilt from what was parsed, so that no two readers on the way can
disagree about where a message ends. Hop-by-hop headers (RFC 9110, 7.6.1) stop here, those that `Connection` names too.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from libc.string cimport memchr, memcpy

from pointsman.daemon.relay.framing cimport BodyFraming, IN_CHUNK_SIZE, IN_LENGTH, TO_CLOSE

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char *a, const char *b, size_t n)

cdef extern from *:
    """
    /* RFC 9110, 5.6.2: the characters of a token, as a header's name is one */
    static const unsigned char token_chars[256] = {
        ['!'] = 1, ['#'] = 1, ['$'] = 1, ['%'] = 1, ['&'] = 1, ['\\''] = 1, ['*'] = 1, ['+'] = 1, ['-'] = 1, ['.'] = 1,
        ['^'] = 1, ['_'] = 1, ['`'] = 1, ['|'] = 1, ['~'] = 1, ['0' ... '9'] = 1, ['a' ... 'z'] = 1, ['A' ... 'Z'] = 1,
    };
    """
    const unsigned char token_chars[256]


class HeadError(Exception):
    """A worker's response head that no strict parser would accept."""


HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)

cdef enum:
    NO_LENGTH = -1
    MAX_LENGTH_DIGITS = 18

cdef enum Meaning:  # of a response header line, to the relay
    KEEP
    DROP
    CONTENT_TYPE
    LENGTH
    ENCODING
    CONNECTION


cdef inline bint _is(const char *name, Py_ssize_t size, const char *other, Py_ssize_t other_size) noexcept:
    return size == other_size and strncasecmp(name, other, size) == 0


cdef Meaning _meaning(const char *name, Py_ssize_t size) noexcept:
    cdef unsigned char first = name[0] | 0x20
    if first == c'c':
        if _is(name, size, b"content-length", 14):
            return LENGTH
        if _is(name, size, b"content-type", 12):
            return CONTENT_TYPE
        if _is(name, size, b"connection", 10):
            return CONNECTION
    elif first == c't':
        if _is(name, size, b"transfer-encoding", 17):
            return ENCODING
        if _is(name, size, b"te", 2) or _is(name, size, b"trailer", 7):
            return DROP
    elif first == c'k':
        return DROP if _is(name, size, b"keep-alive", 10) else KEEP
    elif first == c'p':
        if _is(name, size, b"proxy-connection", 16) or _is(name, size, b"proxy-authenticate", 18):
            return DROP
        return DROP if _is(name, size, b"proxy-authorization", 19) else KEEP
    elif first == c'u':
        return DROP if _is(name, size, b"upgrade", 7) else KEEP
    elif first == c'h':
        return DROP if _is(name, size, b"http2-settings", 14) else KEEP
    elif first == c'x':
        return DROP if _is(name, size, b"x-request-id", 12) else KEEP
    return KEEP


@cython.freelist(64)
cdef class ResponseHead:
    """`lines`: header lines to pass on, each with a CRLF before it."""

    def __init__(
        self, int status, bytes status_line not None, bytes lines not None, content_length, bint is_chunked,
        bint keeps_alive, bint is_event_stream,
    ):
        self.status, self.status_line, self.lines = status, status_line, lines
        self.length = NO_LENGTH if content_length is None else content_length
        self.is_chunked, self.keeps_alive, self.is_event_stream = is_chunked, keeps_alive, is_event_stream

    @property
    def content_length(self):
        return None if self.length == NO_LENGTH else self.length

    def header(self, bytes name not None):
        """The first value of one of the lines that pass on; `name` in lower case. None: there is none."""
        for line in self.lines.split(b"\r\n"):
            key, _, value = line.partition(b":")
            if key.lower() == name:
                return value.strip()
        return None


cdef inline bint _is_space(char c) noexcept:
    return c == c' ' or c'\t' <= c <= c'\r'


cpdef Py_ssize_t end_of_head(bytes data, Py_ssize_t start, Py_ssize_t most) noexcept:
    """Behind the first empty line from `start` on, within the first `most` bytes; 0: there is none."""
    cdef const char *first = PyBytes_AS_STRING(data)
    cdef const char *last = first + min(len(data), most) - 2
    cdef const char *p = first + start
    while p < last:
        p = <const char *> memchr(p, c'\n', last - p)
        if p == NULL:
            return 0
        if p > first + start and p[-1] == c'\r' and p[1] == c'\r' and p[2] == c'\n':
            return p + 3 - first
        p += 1
    return 0


cpdef ResponseHead parse_response_head(bytes raw, Py_ssize_t start=0, Py_ssize_t end=-1):
    """`raw[start:end]` ends with the empty line. Raises HeadError."""
    cdef const char *p = PyBytes_AS_STRING(raw)
    cdef const char *colon
    cdef const char *stop
    cdef Py_ssize_t at, line_end, value, value_end, last
    cdef bytes passing
    cdef char *to
    cdef ResponseHead head = ResponseHead.__new__(ResponseHead)
    cdef set named = None
    cdef Meaning meaning
    last = (len(raw) if end < 0 else end) - 2  # where the empty line begins
    line_end = _line_end(p, start, last)
    _read_status(head, raw, start, line_end)
    head.length = NO_LENGTH
    passing = PyBytes_FromStringAndSize(NULL, last - line_end + 2)
    to = PyBytes_AS_STRING(passing)
    at = line_end + 2
    while at < last:
        line_end = _line_end(p, at, last)
        value = at
        while token_chars[<unsigned char> p[value]]:  # ends at the CR, at the latest
            value += 1
        if value == at or p[value] != c':':
            raise HeadError("a header line of the worker is malformed")
        meaning = _meaning(p + at, value - at)
        value += 1
        if memchr(p + value, 0, line_end - value) != NULL or memchr(p + value, c'\n', line_end - value) != NULL:
            raise HeadError("a header line of the worker is malformed")
        value_end = line_end
        while value < value_end and _is_space(p[value]):
            value += 1
        while value < value_end and _is_space(p[value_end - 1]):
            value_end -= 1
        if meaning == KEEP or meaning == CONTENT_TYPE:
            if meaning == CONTENT_TYPE and value_end - value >= 17:
                head.is_event_stream |= strncasecmp(p + value, b"text/event-stream", 17) == 0
            to[0], to[1] = c'\r', c'\n'
            memcpy(to + 2, p + at, line_end - at)
            to += 2 + line_end - at
        elif meaning == LENGTH:
            _read_length(head, raw, value, value_end)
        elif meaning == ENCODING:
            if head.is_chunked or not _is(p + value, value_end - value, b"chunked", 7):
                raise HeadError(f"unsupported transfer coding {raw[value : min(value_end, value + 64)]!r}")
            head.is_chunked = True
        elif meaning == CONNECTION:
            tokens = {token.strip().lower() for token in raw[value:value_end].split(b",")}
            named = (named or set()) | (tokens - {b"close", b"keep-alive"})
            head.keeps_alive = b"close" not in tokens and (head.keeps_alive or b"keep-alive" in tokens)
        at = line_end + 2
    if head.is_chunked and head.length != NO_LENGTH:
        # RFC 9112, 6.3: chunked wins, and the connection is not to be trusted
        head.length, head.keeps_alive = NO_LENGTH, False
    head.lines = PyBytes_FromStringAndSize(PyBytes_AS_STRING(passing), to - PyBytes_AS_STRING(passing))
    if named:
        kept = [line for line in head.lines.split(b"\r\n")[1:] if line.partition(b":")[0].lower() not in named]
        head.lines = b"".join([b"\r\n" + line for line in kept])
    return head


cdef Py_ssize_t _line_end(const char *p, Py_ssize_t at, Py_ssize_t last) except -1:
    """Where the CRLF is that ends the line at `at`; the head ends with one at `last`."""
    cdef const char *found = <const char *> memchr(p + at, c'\r', last - at) if at < last else NULL
    if found == NULL or found[1] != c'\n':
        raise HeadError("a header line of the worker is malformed")
    return found - p


cdef int _read_status(ResponseHead head, bytes raw, Py_ssize_t start, Py_ssize_t end) except -1:
    cdef const char *p = PyBytes_AS_STRING(raw) + start
    cdef Py_ssize_t size = end - start
    if (
        size < 12 or strncasecmp(p, b"HTTP/1.", 7) or p[0] != c'H' or p[1] != c'T' or p[2] != c'T' or p[3] != c'P'
        or not c'0' <= p[7] <= c'1' or p[8] != c' ' or not c'1' <= p[9] <= c'5'
        or not c'0' <= p[10] <= c'9' or not c'0' <= p[11] <= c'9' or (size > 12 and p[12] != c' ')
        or memchr(p, 0, size) != NULL or memchr(p, c'\n', size) != NULL
    ):
        raise HeadError("the worker's status line is malformed")
    head.status = 100 * (p[9] - c'0') + 10 * (p[10] - c'0') + p[11] - c'0'
    head.keeps_alive = p[7] == c'1'
    head.status_line = PyBytes_FromStringAndSize(p, size)
    return 0


cdef int _read_length(ResponseHead head, bytes raw, Py_ssize_t start, Py_ssize_t end) except -1:
    cdef const char *p = PyBytes_AS_STRING(raw)
    cdef int64_t length = 0
    cdef Py_ssize_t i
    cdef bint is_number = 0 < end - start <= MAX_LENGTH_DIGITS
    for i in range(start, end):
        if not is_number or not c'0' <= p[i] <= c'9':
            raise HeadError(f"bad Content-Length {raw[start : min(end, start + 32)]!r}")
        length = 10 * length + p[i] - c'0'
    if not is_number:
        raise HeadError("bad Content-Length: it is empty")
    if head.length != NO_LENGTH and head.length != length:
        raise HeadError("two different Content-Length")
    head.length = length
    return 0


cpdef BodyFraming framing_of(ResponseHead head, bytes method):
    """RFC 9112, 6.3."""
    if head.status in (204, 304) or head.status < 200 or method == b"HEAD":
        return BodyFraming(IN_LENGTH, 0)
    if head.is_chunked:
        return BodyFraming(IN_CHUNK_SIZE)
    if head.length != NO_LENGTH:
        return BodyFraming(IN_LENGTH, head.length)
    return BodyFraming(TO_CLOSE)


cdef inline char *_put(char *to, bytes text) noexcept:
    memcpy(to, PyBytes_AS_STRING(text), len(text))
    return to + len(text)


cdef inline char *_put_text(char *to, const char *text, size_t size) noexcept:
    memcpy(to, text, size)
    return to + size


cdef inline char *_put_number(char *to, int64_t value) noexcept:
    cdef char digits[24]
    cdef int n = 0
    while True:
        digits[n] = c'0' + <char> (value % 10)
        value //= 10
        n += 1
        if value == 0:
            break
    while n:
        n -= 1
        to[0] = digits[n]
        to += 1
    return to


cdef enum:
    OWN_BYTES = 128  # room for the lines that are written here, besides what is handed in


cpdef bytes client_head(ResponseHead head, bint is_http_1_0, bint keep_alive, bytes own_headers):
    """The head for the client. `own_headers` are complete lines with CRLF.

    A HTTP/1.0 client gets no chunks (the relay takes them apart and closes at the end).
    """
    cdef Py_ssize_t room = len(head.status_line) + len(head.lines) + len(own_headers) + OWN_BYTES
    cdef bytes out = PyBytes_FromStringAndSize(NULL, room)
    cdef char *start = PyBytes_AS_STRING(out)
    cdef char *to = _put(start, head.status_line)
    start[7] = c'1'  # whatever version the worker speaks
    to = _put(to, head.lines)
    if head.length != NO_LENGTH and head.status != 204:
        to = _put_number(_put_text(to, b"\r\nContent-Length: ", 18), head.length)
    elif head.is_chunked and not is_http_1_0 and head.status >= 200 and head.status not in (204, 304):
        to = _put_text(to, b"\r\nTransfer-Encoding: chunked", 28)
    if not keep_alive:
        to = _put_text(to, b"\r\nConnection: close", 19)
    elif is_http_1_0:
        to = _put_text(to, b"\r\nConnection: keep-alive", 24)
    to = _put_text(_put(_put_text(to, b"\r\n", 2), own_headers), b"\r\n", 2)
    return PyBytes_FromStringAndSize(start, to - start)


cpdef bytes own_lines(bytes request_id, bytes identity, bytes profile_line, bytes strategy_line):
    """The lines that every answer of a routed request gets; all but the id are complete lines."""
    cdef Py_ssize_t size = 16 + len(request_id) + len(identity) + len(profile_line) + len(strategy_line)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef char *to = _put_text(PyBytes_AS_STRING(out), b"X-Request-Id: ", 14)
    to = _put_text(_put(to, request_id), b"\r\n", 2)
    _put(_put(_put(to, identity), profile_line), strategy_line)
    return out


cpdef bytes joined(bytes head, bytes data, Py_ssize_t start, Py_ssize_t end):
    """`head + data[start:end]`, copied once."""
    cdef bytes out = PyBytes_FromStringAndSize(NULL, len(head) + end - start)
    memcpy(_put(PyBytes_AS_STRING(out), head), PyBytes_AS_STRING(data) + start, end - start)
    return out


cpdef bytes request_head(
    bytes method, bytes target, bytes host, bytes lines, bytes authorization, body_size, bytes request_id
):
    """The head for a worker. `lines`: the client's headers that pass, complete with CRLF; a size of None = no body."""
    cdef Py_ssize_t room = len(method) + len(target) + len(host) + len(lines) + len(request_id) + OWN_BYTES
    cdef bytes out
    cdef char *start
    cdef char *to
    if authorization is not None:
        room += len(authorization)
    out = PyBytes_FromStringAndSize(NULL, room)
    start = PyBytes_AS_STRING(out)
    to = _put(_put_text(_put(start, method), b" ", 1), target)
    to = _put_text(_put(_put_text(to, b" HTTP/1.1\r\nHost: ", 17), host), b"\r\n", 2)
    to = _put(to, lines)
    if authorization is not None:
        to = _put_text(_put(_put_text(to, b"Authorization: ", 15), authorization), b"\r\n", 2)
    if body_size is not None:
        to = _put_text(_put_number(_put_text(to, b"Content-Length: ", 16), body_size), b"\r\n", 2)
    to = _put_text(_put(_put_text(to, b"X-Request-Id: ", 14), request_id), b"\r\n\r\n", 4)
    return PyBytes_FromStringAndSize(start, to - start)
