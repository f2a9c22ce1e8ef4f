cimport cython

cdef class LineWriter:
    cdef object _write, _call_later, _count_dropped
    cdef list _lines
    cdef Py_ssize_t _batch_bytes, _size
    cdef bint _is_scheduled

    cpdef line(self, bytes line)
    cdef _schedule(self)
    @cython.locals(lines=list, end=Py_ssize_t, size=Py_ssize_t)
    cdef Py_ssize_t _batch_end(self, Py_ssize_t start) except -1
