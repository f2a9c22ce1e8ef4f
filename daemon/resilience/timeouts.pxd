cimport cython

cdef double _NEVER
cdef int _LOOKS

cdef double _or_never(double seconds) noexcept

cdef class Watch:
    cdef public object section
    cdef public double started
    cdef public bint is_stream, has_answer
    cdef double _sent_at, _stalled_at, _seen_at, _pinged_at, _paused_s
    cdef long long _progress

    @cython.locals(first=double)
    cpdef double first_look(self) except? -1.0
    cpdef sent(self, double now, double paused_s=*)
    cpdef failed(self)
    cpdef bint is_ping_due(self, double now) except -1
    cpdef double stalled(self, double now) except? -1.0
    cpdef reads_again(self, double now)
