cimport cython

cdef double _TICKS_PER_S, _NEVER

cdef class Armed:
    cdef public long long tick

    cpdef double look(self, double now) except? -1.0

cdef class Wheel:
    cdef object _now, _call_later
    cdef dict _ticks
    cdef long long _turned
    cdef bint _is_turning

    @cython.locals(tick="long long", armed=set)
    cpdef arm(self, Armed item, double at)
    @cython.locals(tick="long long", armed=set)
    cpdef disarm(self, Armed item)
