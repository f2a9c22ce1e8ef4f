cdef class Wheel:
    cdef object _now, _call_later
    cdef dict _ticks
    cdef long long _turned
    cdef bint _is_turning

    cpdef arm(self, item, double at)
    cpdef disarm(self, item)
