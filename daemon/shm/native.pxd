from libc.stdint cimport int64_t, uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef uint64_t hash_bytes(const unsigned char *p, Py_ssize_t size) noexcept nogil

cpdef double monotonic() noexcept

cdef class Words:
    cdef Py_buffer view
    cdef int64_t *word
    cdef pthread_mutex_t *mutex
    cdef int64_t shards, slots, loads, workers
    cdef bint attached

    cdef int64_t *_load(self, int64_t shard, int64_t slot) except NULL
    cdef bint _lock(self, int64_t deadline_us) except -1
    cdef int _unlock(self) except -1
    cdef int _book(self, int64_t shard, int64_t slot, int64_t prompt_bytes) except -1
    cdef int _release(self, int64_t shard, int64_t slot, int64_t prompt_bytes) except -1
    cdef bint _is_up(self, int64_t slot) except -1
    cdef int64_t _in_flight(self, int64_t slot) except -2

    cpdef int64_t generation(self) noexcept
    cpdef int64_t get(self, int64_t index) noexcept
    cpdef void put(self, int64_t index, int64_t value) noexcept
    cpdef void add(self, int64_t index, int64_t value) noexcept
    cpdef double get_real(self, int64_t index) noexcept
    cpdef int64_t column(self, int64_t first, int64_t stride, int64_t count) except? -1
    cpdef void observe(self, int64_t row, double seconds) noexcept
