"""Choose and book in one native step, for the policy that most requests go by; booking and its end for all of them.

The steps are those of dispatch.router over words, bookings and index, in the same order and under the same two mutexes:
routing mutex, then the index'. A mutex that is not to be had in time is answered by a way that does without it; the
counters in the segment tell how often. Every row that is written here has this process as its one writer, or belongs
to the routing mutex.
"""
cimport cython
from libc.math cimport exp
from libc.stdint cimport int64_t, uint64_t

from pointsman.daemon.shm.bookings cimport MAX_CANDIDATES, Bookings, Picked
from pointsman.daemon.shm.native cimport Words, hash_bytes
from pointsman.daemon.shm.prefix cimport HashChain, RawIndex

from pointsman.daemon.shm import layout as _layout

cdef extern from *:
    """
    #define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
    """
    void store(int64_t *p, int64_t v) nogil

cdef enum:
    NOTHING_BOOKED = -1
    DEADLINE_US = 2000

UNLOCKED = -1
"""`Booked.reason` of a pick without the routing state."""

cdef int64_t H_LOCK_RECOVERIES = _layout.H_LOCK_RECOVERIES
cdef int64_t L_PROMPT_TOKENS = _layout.L_PROMPT_TOKENS
cdef int64_t L_BELIEVED_TOKENS = _layout.L_BELIEVED_TOKENS
cdef int64_t L_USAGE_PROMPT_TOKENS = _layout.L_USAGE_PROMPT_TOKENS
cdef int64_t L_USAGE_CACHED_TOKENS = _layout.L_USAGE_CACHED_TOKENS
cdef int64_t L_PREDICTIONS = _layout.L_PREDICTIONS
cdef int64_t L_PREDICTED_US = _layout.L_PREDICTED_US
cdef int64_t L_REAL_US = _layout.L_REAL_US
cdef int64_t L_ERROR_US = _layout.L_ERROR_US
cdef int64_t L_REASONS = _layout.L_REASONS
cdef int64_t LOAD_WORDS = _layout.LOAD_WORDS
cdef int64_t G_CACHE_HITS = _layout.G_CACHE_HITS
cdef int64_t G_CACHE_MISSES = _layout.G_CACHE_MISSES
cdef int64_t G_UNBOOKED = _layout.G_UNBOOKED
cdef int64_t G_UNINDEXED = _layout.G_UNINDEXED
cdef int64_t BREAKER_WORDS = _layout.BREAKER_WORDS
cdef int64_t DECISIONS = _layout.DECISIONS
cdef int64_t DECISION_WORDS = _layout.DECISION_WORDS
cdef double CHARS_PER_TOKEN = 4.0

if DECISION_WORDS != 16:
    raise ImportError("layout.py and choosing.pyx do not agree on the record of a decision")

# words of resilience.budget and resilience.breaker, whose machines these lines do the everyday part of
cdef enum:
    BUDGET_POT = 0
    BUDGET_MISSING = 1
    BUDGET_AT = 2
cdef enum:
    BREAKER_STATE = 0
    BREAKER_SERIAL = 1
    BREAKER_FAILURES = 2
    BREAKER_WINDOW = 8
    BREAKER_BUCKETS = 8
    BREAKER_BUCKET_WORDS = 3
    CLOSED = 0
cdef double BUDGET_WINDOW_S = 10.0

NEUTRAL, SUCCEEDED, FAILED = range(3)
"""What `finish` tells the worker's breaker."""


@cython.freelist(16)
cdef class Booked:
    """What one pick charged. `reason`: a position in routing.picking.REASONS, or UNLOCKED.

    `ticket`: of the worker's breaker.
    """

    def __cinit__(self):
        self.number = NOTHING_BOOKED
        self.reason = self.ticket = -1

    def __init__(self, worker, int64_t slot, int64_t prompt_bytes, int64_t prompt_tokens, bint is_blind):
        self.worker = worker
        self.slot = slot
        self.prompt_bytes = prompt_bytes
        self.prompt_tokens = prompt_tokens
        self.is_blind = is_blind


cdef class Candidates:
    """The workers of a pool and, in parallel, their slots, at most MAX_CANDIDATES."""

    def __init__(self, tuple slots not None, tuple workers not None):
        cdef int64_t i
        if len(slots) > MAX_CANDIDATES or len(workers) != len(slots):
            raise ValueError("too many candidates, or as many workers as slots are needed")
        self.workers, self.n = workers, len(slots)
        for i in range(self.n):
            self.slots[i] = slots[i]


cdef class Terms:
    """By what a plan chooses: parameters of expected_cost, and what a request puts into the retry budget."""

    def __init__(
        self, double theta, double theta_gain, double gamma, double kappa_s, double budget_ratio, double budget_min_per_s
    ):
        self.theta, self.theta_gain, self.gamma, self.kappa_s = theta, theta_gain, gamma, kappa_s
        self.budget_ratio, self.budget_min_per_s = budget_ratio, budget_min_per_s


cdef class Chooser:
    """One shard's. `chain` holds the prompt of the request that is chosen for; `group_chars`: see `Booked.group`.

    `breaker_width_s`: of one bucket of the breakers' window, 0 = there are no breakers. `late`: (number, moment, output
    tokens) of bookings that ended while the mutex was not to be had.
    """

    def __init__(
        self, Words words not None, Bookings bookings not None, RawIndex index not None, HashChain chain not None,
        int64_t shard, int64_t ghost, int64_t gauges, int64_t ring, uint64_t group_chars, int64_t budget,
        int64_t breakers,
    ):
        if not bookings.is_lent:
            raise ValueError("the booking table has no buffers for matches and pins")
        self.words, self.bookings, self.index, self.chain = words, bookings, index, chain
        self.matched = <uint64_t *> bookings.matched.buf
        self.pinned = <uint64_t *> bookings.pinned.buf
        self.shard, self.ghost, self.gauges, self.ring, self.group_chars = shard, ghost, gauges, ring, group_chars
        self.budget, self.breakers = budget, breakers
        self.slots = index.ix.head.slots
        if ghost >= self.slots or bookings.matched.len < 8 * self.slots:
            raise ValueError("index and booking table do not fit each other")
        self.late = []

    # --- locking

    def lock(self, double now) -> bool:
        """The routing mutex, with the booking table in order. False: decide without it."""
        return self._lock(now)

    cdef bint _lock(self, double now) except -1:
        cdef list late
        if not self.words._lock(DEADLINE_US):
            return False
        try:
            self.bookings.recover(self.words.word[H_LOCK_RECOVERIES], now)
            if self.late:
                late, self.late = self.late, []
                for number, moment, output_tokens in late:
                    self.bookings.finish(number, moment, output_tokens)
        except BaseException:
            self.words._unlock()
            raise
        return True

    def lock_index(self) -> bool:
        """The index' mutex; without it nobody matches anything."""
        return self._lock_index()

    cdef bint _lock_index(self) except -1:
        cdef int64_t slot
        if self.index._acquire(DEADLINE_US):
            self.index.held = True
            return True
        for slot in range(self.slots):
            self.matched[slot] = self.pinned[slot] = 0
        self._count(G_UNINDEXED)
        return False

    cdef void _count(self, int64_t gauge) noexcept:
        self.words.word[self.gauges + gauge] += 1

    # --- choosing

    cdef object _choose(
        self, Candidates candidates, Terms terms, int64_t prompt_bytes, int64_t prompt_tokens, bint is_blind, double now,
        double draw, bint is_retry,
    ):
        """By expected_cost among the candidates that are up; see Bookings.choose. A retry pays nothing into the budget.

        Returns the Booked; None when none is up, False when the routing mutex is not to be had.
        """
        cdef int64_t slots[MAX_CANDIDATES]
        cdef int64_t place[MAX_CANDIDATES]
        cdef int64_t i, n = 0, slot
        cdef Picked picked
        cdef Booked booked
        cdef bint has_index = False
        self.index._expect(self.chain)
        if not self._lock(now):
            return False
        try:
            for i in range(candidates.n):
                slot = candidates.slots[i]
                if self.words._is_up(slot):
                    slots[n], place[n] = slot, i
                    n += 1
            if n == 0:
                return None
            self._deposit(0.0 if is_retry else terms.budget_ratio, terms.budget_min_per_s, now)
            has_index = self._lock_index()
            if has_index:
                self.index._match_into(self.chain, self.matched)
                for i in range(n):
                    self.pinned[slots[i]] = self.index.ix.slots[slots[i]].pinned
            self.bookings._pick(
                slots, n, prompt_tokens, self.chain.total_chars, now, terms.theta, terms.theta_gain, terms.gamma,
                terms.kappa_s, draw, &picked,
            )
            slot = slots[picked.place]
            booked = Booked.__new__(Booked)
            booked.worker, booked.slot, booked.is_blind = candidates.workers[place[picked.place]], slot, is_blind
            booked.prompt_bytes, booked.prompt_tokens = prompt_bytes, prompt_tokens
            booked.reason = picked.reason
            booked.matched_chars = self.matched[slot]
            booked.cached_tokens = picked.cached
            booked.predicted_s = picked.wait_s + picked.prefill_s
            self._book(booked, now, has_index)
            return booked
        finally:
            if has_index:
                self.index._unlock()
            self.words._unlock()

    def book(self, Booked booked not None, double now, bint has_index):
        """Everything that a pick charges. The routing mutex is held, with `has_index` the index' too."""
        self._book(booked, now, has_index)

    cdef int _book(self, Booked booked, double now, bint has_index) except -1:
        cdef int64_t slot = booked.slot
        cdef int64_t *row = self.words._load(self.shard, slot)
        cdef int64_t capacity
        self.words._book(self.shard, slot, booked.prompt_bytes)
        booked.ticket = self._breaker(slot)[BREAKER_SERIAL]
        booked.number = self.bookings.book(
            self.shard, slot, now, booked.prompt_tokens - booked.cached_tokens, booked.cached_tokens,
            <int64_t> (<int64_t> self.bookings.output_mean * CHARS_PER_TOKEN), booked.is_blind,
        )
        if booked.number < 0:
            self._count(G_UNBOOKED)
        if has_index:
            capacity = self.bookings._reserved_fit(slot)
            if capacity:
                self.index.ix.slots[slot].capacity = capacity
            if self.chain.n:
                booked.group = self.chain._head(self.group_chars)
                booked.pin = self.index._pin(slot, self.chain, self.shard, True)
                self.index._insert_into(self.ghost, self.chain)
        row[L_PROMPT_TOKENS] += booked.prompt_tokens
        row[L_BELIEVED_TOKENS] += booked.cached_tokens
        if 0 <= booked.reason < LOAD_WORDS - L_REASONS:
            row[L_REASONS + booked.reason] += 1
        self._count(G_CACHE_HITS if booked.matched_chars else G_CACHE_MISSES)
        return 0

    # --- what became of it

    cpdef first_token(self, Booked booked, double now):
        """The first data of a streamed answer came. Without the mutex the booking waits in line for its end."""
        if booked.number < 0 or booked.is_blind or not self._lock(now):
            return
        try:
            self.bookings.first_token(booked.number, now)
        finally:
            self.words._unlock()

    def finish(
        self, Booked booked not None, double now, int64_t output_tokens, bint was_computed, int64_t verdict=NEUTRAL
    ) -> bool:
        """The request is over, once for everything that was booked; -1 tokens: it failed or was cancelled.

        Not `was_computed`: the worker failed it before it had anything to cache. `verdict`: for the worker's breaker;
        True: that has to be told by resilience.breaker, it is more than a success on a closed one.
        """
        return self._finish(booked, now, output_tokens, was_computed, verdict)

    cdef bint _finish(
        self, Booked booked, double now, int64_t output_tokens, bint was_computed, int64_t verdict
    ) except -1:
        cdef int64_t number = booked.number, capacity
        cdef bint is_news = verdict == FAILED
        self.words._release(self.shard, booked.slot, booked.prompt_bytes)
        booked.number = NOTHING_BOOKED
        if number >= 0:
            if not self._lock(now):
                self.late.append((number, now, output_tokens))
            else:
                try:
                    self.bookings.finish(number, now, output_tokens)
                    if verdict == SUCCEEDED:
                        is_news = not self._succeeded(booked, now)
                finally:
                    self.words._unlock()
                capacity = self.bookings._reserved_fit(booked.slot)
                if capacity:
                    self.index.ix.slots[booked.slot].capacity = capacity
        if booked.pin:
            if was_computed:
                self.index._unpin(booked.pin)
            else:
                self.index._withdraw(booked.pin, booked.matched_chars)
            booked.pin = 0
        return is_news

    # --- the everyday part of resilience

    def deposit(self, double ratio, double min_per_s, double now):
        """RetryBudget.deposit. The routing mutex is held."""
        self._deposit(ratio, min_per_s, now)

    cdef void _deposit(self, double ratio, double min_per_s, double now) noexcept:
        cdef double *word = <double *> (self.words.word + self.budget)
        cdef double elapsed = now - word[BUDGET_AT]
        if elapsed > 0.0:
            word[BUDGET_POT] = word[BUDGET_POT] * exp(-elapsed / BUDGET_WINDOW_S)
            word[BUDGET_AT] = now
            word[BUDGET_MISSING] = max(word[BUDGET_MISSING] - min_per_s * elapsed, 0.0)
        word[BUDGET_POT] += ratio

    cdef int64_t *_breaker(self, int64_t slot) noexcept:
        return self.words.word + self.breakers + slot * BREAKER_WORDS

    cdef bint _succeeded(self, Booked booked, double now) noexcept:
        """Breaker.record of a success on a closed breaker. False: it is not closed."""
        cdef int64_t *word = self._breaker(booked.slot)
        cdef int64_t *bucket
        cdef double start
        cdef int64_t turn
        if self.breaker_width_s <= 0.0:
            return True
        if word[BREAKER_STATE] != CLOSED:
            return False
        if booked.ticket != word[BREAKER_SERIAL]:
            return True
        turn = <int64_t> (now / self.breaker_width_s)
        bucket = word + BREAKER_WINDOW + turn % BREAKER_BUCKETS * BREAKER_BUCKET_WORDS
        start = turn * self.breaker_width_s
        if (<double *> bucket)[0] != start:
            bucket[1] = bucket[2] = 0
            (<double *> bucket)[0] = start
        bucket[1] += 1
        word[BREAKER_FAILURES] = 0
        return True

    def settle(self, double now):
        """From time to time: end what could not be ended, though no request may come to do it."""
        if self.late and self._lock(now):
            self.words._unlock()
        self.index.settle()

    cpdef int64_t note(
        self, Booked booked, bytes request_id, int64_t worker_key, int64_t ended_us, int64_t first_byte_us,
        int64_t total_us, int64_t output_tokens, int64_t prompt_tokens, int64_t cached_tokens, int64_t status,
    ) except? -1:
        """How it came true, for the counters and the ring (shm.decisions has the record): -1 where nobody knows.

        `worker_key`: of the worker's id; times in microseconds, `ended_us` since 1970; the tokens are the engine's.
        Returns the key of the request id.
        """
        cdef int64_t *row = self.words._load(self.shard, booked.slot)
        cdef int64_t predicted_us = <int64_t> (booked.predicted_s * 1e6)
        cdef int64_t *head = self.words.word + self.ring
        cdef int64_t number = head[0] + 1
        cdef int64_t *record = head + 8 + (number % DECISIONS) * DECISION_WORDS
        cdef int64_t key = hash_bytes(<const unsigned char *> <char *> request_id, len(request_id))
        if first_byte_us >= 0 and booked.reason >= 0:
            row[L_PREDICTIONS] += 1
            row[L_PREDICTED_US] += predicted_us
            row[L_REAL_US] += first_byte_us
            row[L_ERROR_US] += abs(predicted_us - first_byte_us)
        if prompt_tokens >= 0 and cached_tokens >= 0:
            row[L_USAGE_PROMPT_TOKENS] += prompt_tokens
            row[L_USAGE_CACHED_TOKENS] += cached_tokens
        store(record, 0)
        record[1], record[2], record[3], record[4] = ended_us, booked.slot, worker_key, booked.reason
        record[5], record[6], record[7] = booked.prompt_tokens, booked.cached_tokens, predicted_us
        record[8], record[9], record[10], record[11] = <int64_t> booked.group, key, first_byte_us, total_us
        record[12], record[13], record[14], record[15] = output_tokens, prompt_tokens, cached_tokens, status
        store(record, number)
        store(head, number)
        return key
