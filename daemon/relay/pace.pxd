cdef class Pace:
    cdef readonly double round_s
    cdef double _sampled_at, _found

    cpdef bint sample(self, double now) except -1
    cpdef bint round_over(self, long long found) except -1
