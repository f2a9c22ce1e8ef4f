"""What is looked at in every header line of every request, and what is written of them to workers."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.string cimport memchr, memcmp, memcpy

from pointsman.daemon.relay.heads cimport end_of_head

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char *a, const char *b, size_t n)

cdef extern from *:
    """
    /* control characters that llhttp lets pass in a value; it lets no CR or LF into one */
    static const unsigned char control_bytes[256] = {
        [0 ... 8] = 1, [11] = 1, [12] = 1, [14 ... 31] = 1, [127] = 1,
    };
    static const unsigned char bad_in_target[256] = { [0 ... 32] = 1, [127] = 1, ['#'] = 1 };
    """
    const unsigned char control_bytes[256]
    const unsigned char bad_in_target[256]

SPECIAL = {
    b"connection": HOP,
    b"keep-alive": HOP,
    b"proxy-authenticate": HOP,
    b"proxy-authorization": HOP,
    b"proxy-connection": HOP,
    b"te": HOP,
    b"trailer": HOP,
    b"upgrade": HOP,
    b"http2-settings": HOP,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"host": HOST,
    b"content-length": CONTENT_LENGTH,
    b"content-type": CONTENT_TYPE,
    b"authorization": AUTHORIZATION,
    b"external-filter": ROUTING,
    b"routing-strategy": ROUTING,
    b"user": ROUTING,
    b"x-aibrix-session-key": ROUTING,
    b"x-session-id": ROUTING,
    b"x-smg-routing-key": ROUTING,
    b"x-smg-target-worker": ROUTING,
    b"config-profile": RARE,
    b"expect": RARE,
    b"x-api-key": RARE,
    b"x-pointsman-explain": RARE,
    b"x-pointsman-internal": RARE,
    b"x-pointsman-key": RARE,
    b"x-pointsman-peer": RARE,
    b"x-request-id": RARE,
}
"""Every header that is not just passed on, in lower case."""

cdef enum:
    MAX_HEAD_CUT = 4096
    MOST_BYTES = 32
    ROOM = 8

cdef struct Name:
    const char *text
    HeaderKind kind

cdef list _kept = sorted(SPECIAL)  # the table points into these
cdef Name names[MOST_BYTES][ROOM]  # by length; NULL ends a row


cdef void _fill() except *:
    cdef int place
    cdef bytes name
    for name in _kept:
        place = 0
        while names[len(name)][place].text != NULL:
            place += 1
        if len(name) >= MOST_BYTES or place == ROOM - 1:
            raise ImportError("the table of header names is full")
        names[len(name)][place].text = PyBytes_AS_STRING(name)
        names[len(name)][place].kind = SPECIAL[name]


_fill()


cpdef HeaderKind kind_of(bytes name):
    """What a request's header is to the gateway."""
    cdef Py_ssize_t size = len(name)
    cdef const char *text = PyBytes_AS_STRING(name)
    cdef Name *each
    if size >= MOST_BYTES:
        return ORDINARY
    each = names[size]
    while each.text != NULL:
        if (text[0] | 0x20) == each.text[0] and strncasecmp(text, each.text, size) == 0:
            return each.kind
        each += 1
    return ORDINARY


cpdef bytes header_lines(list passing):
    """Of names and values by turns, complete with CRLF."""
    cdef Py_ssize_t n, size = 2 * len(passing)
    cdef bytes field, name, value, lines
    cdef char *to
    for field in passing:
        size += len(field)
    lines = PyBytes_FromStringAndSize(NULL, size)
    to = PyBytes_AS_STRING(lines)
    for n in range(0, len(passing), 2):
        name, value = passing[n], passing[n + 1]
        memcpy(to, PyBytes_AS_STRING(name), len(name))
        to += len(name)
        to[0], to[1] = c':', c' '
        memcpy(to + 2, PyBytes_AS_STRING(value), len(value))
        to += 2 + len(value)
        to[0], to[1] = c'\r', c'\n'
        to += 2
    return lines


cdef inline bint _holds(bytes text, const unsigned char *table) noexcept:
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(text)
    cdef Py_ssize_t i
    cdef unsigned char found = 0
    for i in range(len(text)):
        found |= table[p[i]]
    return found


cpdef bint holds_control(bytes text) except -1:
    """Complete lines may be searched at once: CR and LF are not looked for."""
    return _holds(text, control_bytes)


cpdef bint is_bad_target(bytes target) except -1:
    """Whether a space, a control character or a `#` is in it."""
    return _holds(target, bad_in_target)


cpdef bytes path_of(bytes target):
    """What stands before the query."""
    cdef const char *start = PyBytes_AS_STRING(target)
    cdef const char *mark = <const char *> memchr(start, c'?', len(target))
    return target if mark == NULL else PyBytes_FromStringAndSize(start, mark - start)


cpdef bint is_http_1_1(bytes data) noexcept:
    """Whether the first line ends with that version."""
    cdef const char *start = PyBytes_AS_STRING(data)
    cdef const char *end = <const char *> memchr(start, c'\n', len(data))
    return end != NULL and end - start >= 10 and memcmp(end - 10, b" HTTP/1.1\r", 10) == 0


cpdef bytes whole_head(bytes data):
    """All up to the first empty line; b"": there is none among the first `MAX_HEAD_CUT` bytes."""
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), end_of_head(data, 0, MAX_HEAD_CUT))


cpdef long long length_of(bytes value) noexcept:
    """What a Content-Length says; -1: it is no number of at most 18 digits."""
    cdef const char *p = PyBytes_AS_STRING(value)
    cdef Py_ssize_t i, size = len(value)
    cdef long long length = 0
    if not 0 < size <= 18:
        return -1
    for i in range(size):
        if not c'0' <= p[i] <= c'9':
            return -1
        length = 10 * length + p[i] - c'0'
    return length


cpdef bytes numbered(bytes prefix, unsigned long long number):
    """`prefix` and the number, in hexadecimal digits."""
    cdef char digits[16]
    cdef int n = 16
    cdef bytes out
    while True:
        n -= 1
        digits[n] = b"0123456789abcdef"[number & 15]
        number >>= 4
        if not number:
            break
    out = PyBytes_FromStringAndSize(NULL, len(prefix) + 16 - n)
    memcpy(PyBytes_AS_STRING(out), PyBytes_AS_STRING(prefix), len(prefix))
    memcpy(PyBytes_AS_STRING(out) + len(prefix), digits + n, 16 - n)
    return out
