cimport cython

from pointsman.daemon.shm.native cimport Words

cdef long long _ROUTE_SHIFT, _MODEL_SHIFT, _KINDS, _WORDS

cdef class Series:
    cdef Words _words
    cdef dict _index
    cdef long long _full, _histograms, _start, _used, _last_key, _last_pair

    cpdef count(self, long long route, long long model, long long code)
    cpdef observe(self, long long route, long long kind, double seconds)
    @cython.locals(key="long long")
    cdef long long _pair(self, long long route, long long model, long long code) except -1
    cdef long long _pair_when_full(self, long long route, long long model, long long code) except -1
