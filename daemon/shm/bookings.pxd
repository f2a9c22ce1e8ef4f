from libc.stdint cimport int64_t, uint64_t

cdef enum:
    MAX_CANDIDATES = 256

cdef struct Picked:
    int64_t place
    int64_t cached
    int64_t reason
    double wait_s
    double prefill_s

cdef class Bookings:
    cdef Py_buffer view
    cdef int64_t *word
    cdef int64_t shards, workers, per_shard, first_booking
    cdef bint attached
    cdef int64_t *hints
    cdef Py_buffer matched, pinned
    cdef bint is_lent

    cpdef int64_t book(
        self, int64_t shard, int64_t worker, double now, int64_t new, int64_t context, int64_t reserved=*,
        bint is_blind=*,
    ) except -2
    cpdef first_token(self, int64_t number, double now)
    cpdef finish(self, int64_t number, double now, int64_t output_tokens=*)
    cpdef bint recover(self, int64_t recoveries, double now) except -1

    cdef int _pick(
        self, const int64_t *candidates, int64_t n, int64_t prompt_tokens, int64_t total_chars, double now,
        double theta, double theta_gain, double gamma, double kappa_s, double draw, Picked *picked,
    ) except -1
    cdef int _empty(self, int64_t worker) except -1
    cdef int64_t *_worker(self, int64_t worker) except NULL
    cdef int64_t *_booking(self, int64_t number) except NULL
    cdef int _begin_decoding(self, int64_t number, double now) except -1
    cdef int _ripen(self, int64_t worker, double now) except -1
    cdef double _wait(self, int64_t worker, double now) except? -1.0
    cdef double _lost_with(self, int64_t total_chars) noexcept
    cdef double _expected_cost(
        self, int64_t worker, int64_t prompt_tokens, double prefill_s, double now, double theta, double gamma,
        double kappa_s,
    ) except? -1.0
    cdef int64_t _cached(self, uint64_t matched, int64_t prompt_tokens, int64_t total_chars) noexcept
    cdef int64_t _free(self, int64_t shard) except -2
    cdef int _count(self, int64_t number) except -1
    cdef int _enter(self, int64_t number, double now) except -1
    cdef int _leave_line(self, int64_t number, double now) except -1
    cdef double _seconds(self, double new, double context) noexcept
    cdef void _learn(self, double new, double context, double seconds) noexcept
    cdef void _smooth(self, int64_t *mean, double sample) noexcept
    cdef void _serve(self, int64_t *worker, double tokens, double now) noexcept
    cdef double _busy(self, int64_t *worker, double now) noexcept
    cdef void _mark_busy(self, int64_t *worker, double now) noexcept
    cdef int64_t _reserved_fit(self, int64_t worker) except -2
