from libc.stdint cimport uint64_t

cdef enum:
    IN_LENGTH = 0
    TO_CLOSE = 1
    IN_CHUNK_SIZE = 2
    IN_CHUNK_DATA = 3
    AT_CHUNK_END = 4
    IN_TRAILER = 5
    AT_END = 6

cdef class BodyFraming:
    cdef int at
    cdef readonly uint64_t left
    cdef readonly bint is_done, ends_with_connection
    cdef bytes _line
    cdef unsigned char _tail[4]
    cdef int _tail_bytes
    cdef Py_ssize_t _trailer_bytes

    cpdef Py_ssize_t take_chunks(self, bytes data) noexcept
    cdef Py_ssize_t take_chunks_at(self, const unsigned char *p, Py_ssize_t size) noexcept
    cdef int _keep_tail(self, const unsigned char *p, Py_ssize_t size) noexcept
    cpdef Py_ssize_t feed(self, bytes data, Py_ssize_t position=*, list pieces=*) except -1
    cdef int _take(self, bytes data, Py_ssize_t start, Py_ssize_t end, list pieces) except -1
    cdef bytes _take_line(self, bytes data, Py_ssize_t *position)
    cdef int _read_size(self, bytes data, Py_ssize_t *position) except -1
    cdef int _read_chunk_end(self, bytes data, Py_ssize_t *position) except -1
    cdef int _read_trailer(self, bytes data, Py_ssize_t *position) except -1
