from libc.stdint cimport int64_t, uint64_t

from pointsman.daemon.shm.bookings cimport MAX_CANDIDATES, Bookings
from pointsman.daemon.shm.native cimport Words
from pointsman.daemon.shm.prefix cimport HashChain, RawIndex

cdef class Booked:
    cdef readonly object worker
    cdef readonly int64_t slot, prompt_bytes, prompt_tokens
    cdef readonly bint is_blind
    cdef public int64_t number, reason, matched_chars, cached_tokens
    cdef public uint64_t pin, group, user_key
    cdef public double predicted_s
    cdef public object explanation
    cdef public int64_t ticket

cdef class Candidates:
    cdef tuple workers
    cdef int64_t slots[MAX_CANDIDATES]
    cdef int64_t n

cdef class Terms:
    cdef double theta, theta_gain, gamma, kappa_s, budget_ratio, budget_min_per_s

cdef class Chooser:
    cdef Words words
    cdef Bookings bookings
    cdef RawIndex index
    cdef HashChain chain
    cdef object matched_array, pinned_array
    cdef uint64_t *matched
    cdef uint64_t *pinned
    cdef int64_t shard, ghost, gauges, ring, slots, budget, breakers
    cdef public double breaker_width_s
    cdef uint64_t group_chars
    cdef readonly list late

    cpdef first_token(self, Booked booked, double now)
    cpdef int64_t note(
        self, Booked booked, bytes request_id, int64_t worker_key, int64_t ended_us, int64_t first_byte_us,
        int64_t total_us, int64_t output_tokens, int64_t prompt_tokens, int64_t cached_tokens, int64_t status,
    ) except? -1
    cdef object _choose(
        self, Candidates candidates, Terms terms, int64_t prompt_bytes, int64_t prompt_tokens, bint is_blind, double now,
        double draw, bint is_retry,
    )
    cdef bint _lock(self, double now) except -1
    cdef bint _lock_index(self) except -1
    cdef void _count(self, int64_t gauge) noexcept
    cdef int _book(self, Booked booked, double now, bint has_index) except -1
    cdef bint _finish(
        self, Booked booked, double now, int64_t output_tokens, bint was_computed, int64_t verdict
    ) except -1
    cdef void _deposit(self, double ratio, double min_per_s, double now) noexcept
    cdef int64_t *_breaker(self, int64_t slot) noexcept
    cdef bint _succeeded(self, Booked booked, double now) noexcept
