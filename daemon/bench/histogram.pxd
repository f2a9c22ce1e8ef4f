from libc.stdint cimport int64_t, uint64_t


cdef class Histogram:
    cdef uint64_t *_counts
    cdef Py_ssize_t _size
    cdef readonly int sub_bits
    cdef readonly int64_t count, total, least, most

    cdef Py_ssize_t _index(self, int64_t value) noexcept
    cpdef void record(self, int64_t value) noexcept
