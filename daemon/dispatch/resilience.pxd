from pointsman.daemon.shm.native cimport Words

cdef long long _H_BREAKERS

cdef class SharedResilience:
    cdef Words _all_words
    cdef object _state, _cells, _budget, _admission_words, _rate_words, _profile_rates, _key_rates, _breaker, _admission
    cdef list _breakers, _waiting
    cdef long long _shard, _in_use
    cdef bint _has_breakers, _has_limit
    cdef public object line

    cpdef bint is_quiet(self) noexcept
    cpdef bint is_unlimited(self) except -1
    cpdef enter_freely(self)
    cpdef leave_freely(self)
