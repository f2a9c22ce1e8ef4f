"""Where a response body ends, without touching its bytes.

The relay forwards what it reads; this tells how much of it belongs to the message. It never copies payload, except
for a client that cannot read chunks (HTTP/1.0), for which it collects the pieces.

Strict where laxness would let two readers disagree: chunk sizes are plain hex digits, lines end in CRLF.
"""
from enum import IntEnum

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memmove


class FramingError(Exception):
    """The bytes cannot be the framing that the head announced."""


class State(IntEnum):
    LENGTH = 0
    CLOSE = 1
    CHUNK_SIZE = 2
    CHUNK_DATA = 3
    CHUNK_END = 4
    TRAILER = 5
    DONE = 6


MAX_LINE = 4096
MAX_TRAILERS = 16384

cdef enum:
    QUICK_DIGITS = 8
    MAX_DIGITS = 16
    TAIL_BYTES = 4

cdef inline int _hex(unsigned char c) noexcept:
    if c'0' <= c <= c'9':
        return c - c'0'
    c |= 0x20
    if c'a' <= c <= c'f':
        return c - c'a' + 10
    return -1


cdef inline Py_ssize_t _whole_chunk(const unsigned char *p, Py_ssize_t position, Py_ssize_t size, Py_ssize_t *start) noexcept:
    """The end of the payload of the chunk that begins at `position`; -1: not all of it is there, or it needs care."""
    cdef uint64_t length = 0
    cdef Py_ssize_t i = position
    cdef int digit
    while i < size and i - position < QUICK_DIGITS:
        digit = _hex(p[i])
        if digit < 0:
            break
        length = length << 4 | <uint64_t> digit
        i += 1
    if length == 0 or i + 2 > size or p[i] != c'\r' or p[i + 1] != c'\n':
        return -1
    start[0] = i + 2
    if <uint64_t> (size - start[0]) < length + 2:
        return -1
    i = start[0] + <Py_ssize_t> length
    return i if p[i] == c'\r' and p[i + 1] == c'\n' else -1


cdef class BodyFraming:
    """Feed it what follows the head; `is_done` says that the message is complete.

    `tail` holds the last payload bytes (up to 4): enough to know whether an SSE line or event is open.
    """

    def __init__(self, int state, uint64_t length=0):
        self.at = AT_END if state == IN_LENGTH and length == 0 else state
        self.is_done = self.at == AT_END
        self.ends_with_connection = state == TO_CLOSE
        self.left = length
        self._line = b""

    @property
    def state(self):
        return State(self.at)

    @property
    def is_between_chunks(self):
        return self.at == IN_CHUNK_SIZE and not self._line

    @property
    def tail(self):
        """The last payload bytes (up to 4): enough to know whether an SSE line or event is open."""
        return PyBytes_FromStringAndSize(<char *> self._tail, self._tail_bytes)

    cdef int _keep_tail(self, const unsigned char *p, Py_ssize_t size) noexcept:
        """Of payload that has been read."""
        cdef int kept
        if size < TAIL_BYTES:
            kept = min(self._tail_bytes, TAIL_BYTES - <int> size)
            memmove(self._tail, self._tail + self._tail_bytes - kept, kept)
            memcpy(self._tail + kept, p, size)
            self._tail_bytes = kept + <int> size
        else:
            memcpy(self._tail, p + size - TAIL_BYTES, TAIL_BYTES)
            self._tail_bytes = TAIL_BYTES
        return 0

    cdef int _take(self, bytes data, Py_ssize_t start, Py_ssize_t end, list pieces) except -1:
        """`data[start:end]` is payload."""
        self._keep_tail(<const unsigned char *> <const char *> data + start, end - start)
        if pieces is not None:
            pieces.append(data[start:end])
        return 0

    def spoil(self):
        """After a FramingError nobody knows which of the bytes the client has: it counts as inside a chunk."""
        self.at, self.left, self.is_done, self.ends_with_connection = IN_LENGTH, 1, False, False

    cpdef Py_ssize_t take_chunks(self, bytes data) noexcept:
        """How many chunks `data` is, if it is nothing but whole chunks: then they are taken, at the least cost.

        That is what a streaming engine writes for an event, thousands of times a second. 0: call `feed`.
        """
        return self.take_chunks_at(<const unsigned char *> <const char *> data, len(data))

    cdef Py_ssize_t take_chunks_at(self, const unsigned char *p, Py_ssize_t size) noexcept:
        cdef Py_ssize_t position = 0, chunks = 0, start = 0, end = 0
        if self.at != IN_CHUNK_SIZE or self._line:
            return 0
        while position < size:
            end = _whole_chunk(p, position, size, &start)
            if end < 0:
                return 0
            chunks += 1
            position = end + 2
        if end - start >= TAIL_BYTES:
            self._keep_tail(p + start, end - start)
            return chunks
        position = 0
        while position < size:  # the last one is too short to stand for the tail alone
            end = _whole_chunk(p, position, size, &start)
            self._keep_tail(p + start, end - start)
            position = end + 2
        return chunks

    cpdef Py_ssize_t feed(self, bytes data, Py_ssize_t position=0, list pieces=None) except -1:
        """Consume from `position`; returns the position after the last byte that belongs to this message.

        Payload is appended to `pieces` where given. Raises FramingError.
        """
        cdef const unsigned char *p = <const unsigned char *> <const char *> data
        cdef Py_ssize_t size = len(data), start = 0, end
        while position < size:
            if self.at == IN_CHUNK_SIZE:
                # a whole chunk in one read, which is what a streaming engine writes, without further calls
                end = -1 if self._line else _whole_chunk(p, position, size, &start)
                if end >= 0:
                    self._take(data, start, end, pieces)
                    position = end + 2
                else:
                    self._read_size(data, &position)
            elif self.at == IN_CHUNK_DATA or self.at == IN_LENGTH:
                end = size if self.left > <uint64_t> (size - position) else position + <Py_ssize_t> self.left
                self._take(data, position, end, pieces)
                self.left -= <uint64_t> (end - position)
                position = end
                if self.left == 0:
                    self.is_done = self.at == IN_LENGTH
                    self.at = AT_END if self.is_done else AT_CHUNK_END
            elif self.at == AT_CHUNK_END:
                self._read_chunk_end(data, &position)
            elif self.at == IN_TRAILER:
                self._read_trailer(data, &position)
            elif self.at == TO_CLOSE:
                self._take(data, position, size, pieces)
                position = size
            else:
                break
        return position

    cdef bytes _take_line(self, bytes data, Py_ssize_t *position):
        """The line without CRLF, or None when it is not complete yet; moves `position` behind what was consumed."""
        cdef Py_ssize_t end = data.find(b"\n", position[0])
        cdef bytes line
        if end < 0:
            self._line += data[position[0] :]
            position[0] = len(data)
            if len(self._line) > MAX_LINE:
                raise FramingError("a chunk line is too long")
            return None
        line = self._line + data[position[0] : end + 1]
        self._line = b""
        if len(line) > MAX_LINE or not line.endswith(b"\r\n"):
            raise FramingError("a chunk line does not end in CRLF")
        position[0] = end + 1
        return line[: len(line) - 2]

    cdef int _read_size(self, bytes data, Py_ssize_t *position) except -1:
        cdef bytes line = self._take_line(data, position)
        cdef uint64_t length = 0
        cdef unsigned char c
        if line is None:
            return 0
        if b";" in line:
            line = line.partition(b";")[0].rstrip(b" \t")
        if not 0 < len(line) <= MAX_DIGITS:
            raise FramingError(f"bad chunk size {line[:32]!r}")
        for c in line:
            if _hex(c) < 0 or length >> 56:
                raise FramingError(f"bad chunk size {line[:32]!r}")
            length = length << 4 | <uint64_t> _hex(c)
        self.left = length
        self.at = IN_CHUNK_DATA if length else IN_TRAILER
        return 0

    cdef int _read_chunk_end(self, bytes data, Py_ssize_t *position) except -1:
        cdef Py_ssize_t wanted = 1 if self._line else 2
        cdef bytes rest = self._line + data[position[0] : position[0] + wanted]
        position[0] = min(position[0] + wanted, len(data))
        self._line = b""
        if rest == b"\r":
            self._line = rest
        elif rest == b"\r\n":
            self.at = IN_CHUNK_SIZE
        else:
            raise FramingError("a chunk does not end in CRLF")
        return 0

    cdef int _read_trailer(self, bytes data, Py_ssize_t *position) except -1:
        cdef bytes line = self._take_line(data, position)
        if line is None:
            return 0
        if not line:
            self.at, self.is_done = AT_END, True
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILERS:
            raise FramingError("the trailers are too long")
        return 0
