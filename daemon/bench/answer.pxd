cimport cython
from libc.stdint cimport int64_t

from pointsman.daemon.bench.histogram cimport Histogram


cdef enum State:
    HEAD
    BY_LENGTH
    BY_CLOSE
    CHUNK_SIZE
    CHUNK_EXTENSION
    CHUNK_LF
    CHUNK_DATA
    CHUNK_END_CR
    CHUNK_END_LF
    TRAILER
    COMPLETE
    BROKEN


@cython.final
cdef class Answer:
    cdef readonly int status
    cdef readonly str problem
    cdef readonly bint keeps_alive, is_event_stream, has_done, has_finished
    cdef readonly bytes worker, told, error
    """`told`: the last event with usage; `error`: the event that was an error."""
    cdef readonly Py_ssize_t received, events, texts
    cdef readonly int64_t first_text_ns, last_text_ns
    cdef tuple _worker_headers
    cdef State _state
    cdef bint _wants_stream, _is_error_event
    cdef bytes _head
    cdef list _parts
    cdef Histogram _gaps
    cdef int64_t _left, _now_ns
    cdef int _digits
    cdef Py_ssize_t _trailer_bytes
    cdef char *_line
    cdef Py_ssize_t _line_bytes, _line_room

    cpdef bint feed(self, bytes data, int64_t now_ns) except -1

    cdef const char *_fail(self, str problem) except? NULL
    cdef const char *_read_head(self, bytes data) except? NULL
    cdef int _parse_head(self, const char *p, const char *end) except -1
    cdef void _begin_chunk(self) noexcept
    cdef const char *_read_body(self, const char *p, const char *end) except? NULL
    cdef int _content(self, const char *p, Py_ssize_t count) except -1
    cdef int _read_lines(self, const char *p, const char *end) except -1
    cdef int _keep(self, const char *p, Py_ssize_t count) except -1
    cdef int _read_line(self, const char *p, const char *end) except -1
    cdef int _read_event(self, const char *p, const char *end) except -1
    cdef void _note_text(self) noexcept
