cimport cython

cdef double _TICKS_PER_S, _NEVER
cdef int _SLOTS, _MASK

cdef class Armed:
    cdef public long long tick
    cdef Armed _before, _after

    cpdef double look(self, double now) except? -1.0

cdef Armed _ring()

cdef class Wheel:
    cdef object _now, _call_later
    cdef list _rings
    cdef long long _turned, _armed
    cdef bint _is_turning

    @cython.locals(tick="long long", ring=Armed, last=Armed)
    cpdef arm(self, Armed item, double at)
    @cython.locals(before=Armed, after=Armed)
    cpdef disarm(self, Armed item)
    @cython.locals(tick="long long", last="long long", ring=Armed, each=Armed, following=Armed)
    cpdef _turn(self)
