from pointsman.daemon.shm.native cimport Words

cdef long long _STRIDE

cdef class BodyBuffers:
    cdef Words _words
    cdef long long _first, _shards, _cell, _limit
    cdef double _wait_s
    cdef object _call_later, _now, _waiting
    cdef bint _is_polling

    cpdef bint is_full(self) except -1
    cpdef bint may_keep(self) except -1
    cpdef take(self, long long size)
    cpdef give(self, long long size)
