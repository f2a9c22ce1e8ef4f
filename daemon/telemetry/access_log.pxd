cdef class LineWriter:
    cdef object _write, _call_later, _count_dropped, _lines
    cdef Py_ssize_t _batch_bytes, _size
    cdef bint _is_scheduled

    cpdef line(self, bytes line)
    cdef _schedule(self)
    cdef bytes _next_batch(self)
