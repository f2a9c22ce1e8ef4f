# cython: language_level=3
"""The booking table: what every routed request charges on its worker, shared by all shards.

Theory of operation. The memory is an array of 8-byte words:

    header     cost model (recursive least squares), smoothed output length and stay, share of lost blocks, sequence
    workers    per worker slot: the line of prefills (first and last booking, predicted seconds, when the head began),
               requests decoding, tokens and reserved characters in flight, pace of decoding, tokens served, busy time
    bookings   per shard a fixed number of slots: state, worker, predicted seconds, tokens, links of the line

A booking is `pending` from the pick to its first token (it stands in its worker's line), `decoding` until its end. Of
a *blind* one (an answer that is not streamed) nobody sees the first token: when it is first in line it leaves the line
after its predicted seconds, and teaches the cost model nothing. The slots are the truth; what the worker rows add up can be computed from them at any time. That is the whole recovery:
`rebuild` does it when the routing mutex was taken from a dead holder, `reclaim` ends the bookings of a dead shard.
A slot's state is written last when it is booked and first when it ends, so a half-written booking never counts.

Every method but the constructor must be called with the routing mutex held (native.Words.lock). Links are slot
numbers, nothing points outside. The formulas are those of pointsman.daemon.routing.cost_model and fleet; a
differential test keeps them equal.
"""
from libc.math cimport exp2, fmax, fmin, isfinite
from libc.stdint cimport int64_t, uint64_t
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Calloc, PyMem_Free

from pointsman.daemon.shm import layout as _layout

cdef enum:
    HEADER_WORDS = 64
    WORKER_WORDS = 32
    BOOKING_WORDS = 16
    # header
    H_SEQUENCE = 0
    H_RECOVERIES = 1
    H_PER_TOKENS = 8
    H_PER_PAIRS = 9
    H_P00 = 10
    H_P01 = 11
    H_P11 = 12
    H_BASE_S = 13
    H_SEEN = 14
    H_SLOPE_TOKENS = 20
    H_SLOPE_PAIRS = 21
    H_OUTPUT_MEAN = 16
    H_OUTPUT_SEEN = 17
    H_STAY = 18
    H_STAY_SEEN = 19
    H_LOST = 24
    # worker
    W_FIRST = 0  # the first eight are what a pick reads of every candidate: one cache line
    W_LAST = 1
    W_WAIT_S = 2
    W_HEAD_S = 3
    W_DECODING = 4
    W_KV_CHARS = 5
    W_RESERVED = 6
    W_QUEUED_TOKENS = 7
    W_IN_FLIGHT = 8
    W_TOKENS = 9
    W_PROCESSED = 10
    W_TPOT = 12
    W_TPOT_SEEN = 13
    W_SERVED = 14
    W_SERVED_AT = 15
    W_BUSY_S = 16
    W_BUSY_AT = 17
    # booking
    B_STATE = 0
    B_WORKER = 1
    B_SEQUENCE = 2
    B_BEFORE = 3
    B_AFTER = 4
    B_PREFILL_S = 5  # with the next, what a pick reads of the first in every line
    B_IS_BLIND = 6
    B_NEW = 7
    B_CONTEXT = 8
    B_PROMPT = 9
    B_RESERVED = 10
    B_STARTED_S = 11
    B_FIRST_S = 12
    # state
    FREE = 0
    PENDING = 1
    DECODING = 2

cdef double TOKENS = 1e3
cdef double PAIRS = 1e7
cdef double FORGETTING = 0.999
cdef double MOST_DOUBT = 1.0
cdef double LEAST_SLOPE = 1e-4
cdef double LEAST_WEIGHT = 0.01
cdef double RATE_HALF_LIFE_S = 60.0
cdef double LOST_WEIGHT = 0.005
cdef double MOST_STAYS = 4.0
cdef double CHARS_PER_TOKEN = 4.0
cdef double FIRST_TPOT_S = 0.02
NONE = -1

# What is worth keeping over a restart (`costs`): name, word, whether it is a count.
_COSTS = (
    ("per_tokens", H_PER_TOKENS, False), ("per_pairs", H_PER_PAIRS, False),
    ("slope_tokens", H_SLOPE_TOKENS, False), ("slope_pairs", H_SLOPE_PAIRS, False),
    ("p00", H_P00, False), ("p01", H_P01, False), ("p11", H_P11, False), ("base_s", H_BASE_S, False),
    ("seen", H_SEEN, True),
    ("output_mean", H_OUTPUT_MEAN, False), ("output_seen", H_OUTPUT_SEEN, True),
    ("stay_s", H_STAY, False), ("stay_seen", H_STAY_SEEN, True),
    ("lost", H_LOST, False),
)

# why a worker was picked: positions in routing.picking.REASONS
cdef enum:
    PREFIX = 0
    SPILL = 1
    LOAD = 2
    ONLY_ELIGIBLE = 3

if (HEADER_WORDS, WORKER_WORDS, BOOKING_WORDS) != (
    _layout.BOOKING_HEADER_WORDS, _layout.BOOKING_WORKER_WORDS, _layout.BOOKING_WORDS
):
    raise ImportError("layout.py and bookings.pyx do not agree on the records")


def size_bytes(int64_t shards, int64_t workers, int64_t per_shard) -> int:
    """Memory for `workers` worker slots and `per_shard` bookings in flight on each shard."""
    return 8 * (HEADER_WORDS + workers * WORKER_WORDS + shards * per_shard * BOOKING_WORDS)


cdef class Bookings:
    def __cinit__(self, buffer, int64_t shards, int64_t workers, int64_t per_shard, int64_t offset=0):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.attached = True
        if offset < 0 or offset % 8 or self.view.len < offset + <int64_t> size_bytes(shards, workers, per_shard):
            raise ValueError("the memory is too small for this booking table, or it begins within a word")
        self.word = <int64_t *> self.view.buf + offset // 8
        self.shards, self.workers, self.per_shard = shards, workers, per_shard
        self.first_booking = HEADER_WORDS + workers * WORKER_WORDS
        self.hints = <int64_t *> PyMem_Calloc(shards, sizeof(int64_t))  # by shard, where a free slot is looked for
        if self.hints == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.hints)
        if self.attached:
            PyBuffer_Release(&self.view)
        if self.is_lent:
            PyBuffer_Release(&self.matched)
            PyBuffer_Release(&self.pinned)

    def lend(self, matched, pinned):
        """The buffers that `choose` reads: characters matched and pinned, 8 bytes per worker slot; one more, the ghost."""
        if self.is_lent:
            raise RuntimeError("buffers were lent already")
        PyObject_GetBuffer(matched, &self.matched, PyBUF_WRITABLE)
        PyObject_GetBuffer(pinned, &self.pinned, PyBUF_WRITABLE)
        self.is_lent = True
        if self.matched.len < 8 * (self.workers + 1) or self.pinned.len < 8 * self.workers:
            raise ValueError("the buffers are too small for the worker slots and the ghost")

    def create(self, double base_s=0.001, double token_s=50e-6, double pair_s=2e-9,
               double output_tokens=200.0, double stay_s=5.0):
        """First values of a new table: an 8B model on a recent GPU; every guess is corrected by what is seen."""
        cdef int64_t worker
        cdef double *number = <double *> self.word
        # What least squares says, and what is believed of it: noise may make a slope negative, time is not.
        number[H_SLOPE_TOKENS] = number[H_PER_TOKENS] = token_s * TOKENS
        number[H_SLOPE_PAIRS] = number[H_PER_PAIRS] = pair_s * PAIRS
        number[H_P00], number[H_P01], number[H_P11], number[H_BASE_S] = 1.0, 0.0, 1.0, base_s
        number[H_OUTPUT_MEAN], number[H_STAY] = output_tokens, stay_s
        self.word[H_OUTPUT_SEEN] = self.word[H_STAY_SEEN] = 1
        for worker in range(self.workers):
            self._empty(worker)

    cdef int _empty(self, int64_t worker) except -1:
        cdef int64_t word
        cdef int64_t *row = self._worker(worker)
        for word in range(WORKER_WORDS):
            row[word] = 0
        row[W_FIRST] = row[W_LAST] = NONE
        (<double *> row)[W_TPOT] = FIRST_TPOT_S
        row[W_TPOT_SEEN] = 1
        return 0

    # --- places

    cdef int64_t *_worker(self, int64_t worker) except NULL:
        if not 0 <= worker < self.workers:
            raise IndexError(f"no worker slot {worker}")
        return self.word + HEADER_WORDS + worker * WORKER_WORDS

    cdef int64_t *_booking(self, int64_t number) except NULL:
        if not 0 <= number < self.shards * self.per_shard:
            raise IndexError(f"no booking {number}")
        return self.word + self.first_booking + number * BOOKING_WORDS

    # --- the life of a booking

    cpdef int64_t book(
        self, int64_t shard, int64_t worker, double now, int64_t new, int64_t context, int64_t reserved=0,
        bint is_blind=False,
    ) except -2:
        """Charge a request of `new` uncached and `context` cached prompt tokens; returns its number.

        NONE when this shard has no slot left: the request goes on uncharged. `reserved`: characters of cache that its
        output is expected to take. Times in seconds of the monotonic clock.
        """
        cdef int64_t number = self._free(shard)
        if number < 0:
            return NONE
        cdef int64_t *booking = self._booking(number)
        cdef double *real = <double *> booking
        cdef int64_t *row = self._worker(worker)
        self.word[H_SEQUENCE] += 1
        booking[B_WORKER], booking[B_SEQUENCE] = worker, self.word[H_SEQUENCE]
        booking[B_NEW], booking[B_CONTEXT], booking[B_PROMPT] = new, context, new + context
        booking[B_RESERVED], booking[B_IS_BLIND] = reserved, is_blind
        real[B_PREFILL_S], real[B_STARTED_S] = self._seconds(new, context), now
        booking[B_STATE] = PENDING
        self._mark_busy(row, now)
        self._enter(number, now)
        row[W_PROCESSED] += 1
        self._serve(row, new + context, now)
        return number

    cpdef first_token(self, int64_t number, double now):
        """The prefill is over; whoever stood first in line teaches the cost model. Twice does nothing."""
        cdef int64_t *booking = self._booking(number)
        if booking[B_STATE] != PENDING:
            return
        cdef int64_t *worker = self._worker(booking[B_WORKER])
        if worker[W_FIRST] == number:
            self._learn(booking[B_NEW], booking[B_CONTEXT], now - (<double *> worker)[W_HEAD_S])
        self._begin_decoding(number, now)

    cdef int _begin_decoding(self, int64_t number, double now) except -1:
        cdef int64_t *booking = self._booking(number)
        booking[B_STATE] = DECODING
        (<double *> booking)[B_FIRST_S] = now
        self._leave_line(number, now)
        self._worker(booking[B_WORKER])[W_DECODING] += 1
        return 0

    def ripen(self, int64_t worker, double now):
        """Blind bookings at the head of the line whose predicted seconds are over leave it."""
        self._ripen(worker, now)

    cdef int _ripen(self, int64_t worker, double now) except -1:
        cdef int64_t *row = self._worker(worker)
        cdef int64_t *booking
        cdef double ends
        while row[W_FIRST] >= 0:
            booking = self._booking(row[W_FIRST])
            ends = (<double *> row)[W_HEAD_S] + (<double *> booking)[B_PREFILL_S]
            if not booking[B_IS_BLIND] or ends > now:
                break
            self._begin_decoding(row[W_FIRST], ends)
        return 0

    cpdef finish(self, int64_t number, double now, int64_t output_tokens=-1):
        """The request ended; NONE tokens: it failed, nothing is learned from it. Twice does nothing."""
        cdef int64_t *booking = self._booking(number)
        cdef int64_t state = booking[B_STATE]
        if state == FREE:
            return
        booking[B_STATE] = FREE
        cdef int64_t *worker = self._worker(booking[B_WORKER])
        cdef double first_s = (<double *> booking)[B_FIRST_S]
        self._mark_busy(worker, now)
        if state == PENDING:
            self._leave_line(number, now)
        else:
            worker[W_DECODING] -= 1
        worker[W_IN_FLIGHT] -= 1
        worker[W_TOKENS] -= booking[B_PROMPT]
        worker[W_RESERVED] -= booking[B_RESERVED]
        if output_tokens < 0:
            return
        self._serve(worker, output_tokens, now)
        self._smooth(self.word + H_OUTPUT_MEAN, output_tokens)
        self._smooth(self.word + H_STAY, now - (<double *> booking)[B_STARTED_S])
        if state == DECODING and output_tokens > 1:
            self._smooth(worker + W_TPOT, (now - first_s) / (output_tokens - 1))

    def reclaim(self, int64_t shard, double now) -> int:
        """End all bookings of a dead shard, learning nothing; returns how many there were."""
        cdef int64_t number, ended = 0
        for number in range(shard * self.per_shard, (shard + 1) * self.per_shard):
            if self._booking(number)[B_STATE] != FREE:
                self.finish(number, now)
                ended += 1
        return ended

    def forget_worker(self, int64_t worker):
        """Empty a worker's row for the next tenant of its slot; its bookings must have ended."""
        if self._worker(worker)[W_IN_FLIGHT]:
            raise ValueError(f"worker slot {worker} has requests in flight")
        self._empty(worker)

    # --- recovery

    cpdef bint recover(self, int64_t recoveries, double now) except -1:
        """Rebuild if the mutex changed hands from a dead holder since the last look (segment.lock_recoveries)."""
        if self.word[H_RECOVERIES] == recoveries:
            return False
        self.rebuild(now)
        self.word[H_RECOVERIES] = recoveries
        return True

    def rebuild(self, double now):
        """Compute all worker rows anew from the bookings."""
        cdef int64_t number, worker, word
        cdef list pending = []
        for worker in range(self.workers):
            for word in (W_WAIT_S, W_DECODING, W_IN_FLIGHT, W_TOKENS, W_QUEUED_TOKENS, W_RESERVED):
                self._worker(worker)[word] = 0
            self._worker(worker)[W_FIRST] = self._worker(worker)[W_LAST] = NONE
        for number in range(self.shards * self.per_shard):
            if self._booking(number)[B_STATE] == PENDING:
                pending.append((self._booking(number)[B_SEQUENCE], number))
            elif self._booking(number)[B_STATE] == DECODING:
                self._count(number)
                self._worker(self._booking(number)[B_WORKER])[W_DECODING] += 1
        for _, number in sorted(pending):
            self._enter(number, now)

    # --- what picks read

    def wait_s(self, int64_t worker, double now) -> float:
        """Predicted seconds until a request routed now would be first in the worker's line."""
        return self._wait(worker, now)

    cdef double _wait(self, int64_t worker, double now) except? -1.0:
        cdef int64_t *row = self._worker(worker)
        cdef double *real = <double *> row
        if row[W_FIRST] < 0:
            return 0.0
        cdef double first = (<double *> self._booking(row[W_FIRST]))[B_PREFILL_S]
        return fmax(real[W_WAIT_S] - fmin(fmax(now - real[W_HEAD_S], 0.0), 0.95 * first), 0.0)

    def decoding(self, int64_t worker) -> int:
        return self._worker(worker)[W_DECODING]

    def in_flight(self, int64_t worker) -> int:
        return self._worker(worker)[W_IN_FLIGHT]

    def note_oldest(self, int64_t shard, starts):
        """Lowers `starts` (a writable buffer, a double per worker slot) to when the worker's oldest request on `shard`
        was booked. Goes through all bookings of the shard: for people who ask, not for picks."""
        cdef Py_buffer view
        cdef int64_t number
        cdef int64_t *booking
        cdef double *oldest
        if not 0 <= shard < self.shards:
            raise IndexError(f"no shard {shard}")
        PyObject_GetBuffer(starts, &view, PyBUF_WRITABLE)
        try:
            if view.len < self.workers * <int64_t> sizeof(double):
                raise ValueError("the buffer has less than 8 bytes per worker slot")
            oldest = <double *> view.buf
            for number in range(shard * self.per_shard, (shard + 1) * self.per_shard):
                booking = self._booking(number)
                if booking[B_STATE] != FREE:
                    oldest[booking[B_WORKER]] = fmin(oldest[booking[B_WORKER]], (<double *> booking)[B_STARTED_S])
        finally:
            PyBuffer_Release(&view)

    def tokens(self, int64_t worker) -> int:
        """Prompt tokens in flight."""
        return self._worker(worker)[W_TOKENS]

    def queued_tokens(self, int64_t worker) -> int:
        """Uncached prompt tokens of the line."""
        return self._worker(worker)[W_QUEUED_TOKENS]

    def reserved(self, int64_t worker) -> int:
        return self._worker(worker)[W_RESERVED]

    def processed(self, int64_t worker) -> int:
        return self._worker(worker)[W_PROCESSED]

    def served(self, int64_t worker, double now) -> float:
        """Tokens of the last minute or so: a sum with a half-life of 60 s."""
        cdef double *real = <double *> self._worker(worker)
        return real[W_SERVED] * exp2(-fmax(now - real[W_SERVED_AT], 0.0) / RATE_HALF_LIFE_S)

    def busy(self, int64_t worker, double now) -> float:
        """Share of the last minute or so in which at least one request was in flight."""
        return self._busy(self._worker(worker), now)

    def tpot_s(self, int64_t worker) -> float:
        """Smoothed seconds per output token."""
        return (<double *> self._worker(worker))[W_TPOT]

    def kv_chars(self, int64_t worker) -> int:
        """KV capacity in characters of prompt; 0 = not known."""
        return self._worker(worker)[W_KV_CHARS]

    def set_kv_chars(self, int64_t worker, int64_t chars):
        self._worker(worker)[W_KV_CHARS] = chars

    def seconds(self, double new, double context) -> float:
        """Predicted seconds of computing `new` tokens after `context` cached ones."""
        return self._seconds(new, context)

    @property
    def output_mean(self) -> float:
        return (<double *> self.word)[H_OUTPUT_MEAN]

    @property
    def stay_s(self) -> float:
        return (<double *> self.word)[H_STAY]

    @property
    def lost(self) -> float:
        """Smoothed share of prompt text that was seen lately, yet is held by no worker any more."""
        return (<double *> self.word)[H_LOST]

    @lost.setter
    def lost(self, double share):
        (<double *> self.word)[H_LOST] = share

    def lost_with(self, int64_t total_chars) -> float:
        """`lost` after the request whose matches are in the lent buffer."""
        return self._lost_with(total_chars)

    cdef double _lost_with(self, int64_t total_chars) noexcept:
        cdef double lost = (<double *> self.word)[H_LOST]
        cdef uint64_t *matched = <uint64_t *> self.matched.buf
        cdef uint64_t seen = matched[self.workers]  # by the ghost: at all
        cdef uint64_t held = 0
        cdef int64_t worker
        if not total_chars:
            return lost
        for worker in range(self.workers):
            if held >= seen:
                break
            held = max(held, matched[worker])
        cdef double gone = (<double> (seen - held)) if seen > held else 0.0
        return lost + LOST_WEIGHT * (gone / total_chars - lost)

    def choose(
        self, tuple slots, list loads, int64_t prompt_tokens, int64_t total_chars, double now,
        double theta, double theta_gain, double gamma, double kappa_s, double draw,
    ) -> tuple:
        """The policy expected_cost (routing.expected_cost has the theory) in one call.

        `slots[i]` with `loads[i]` >= 0 is a candidate, at least one is; matches and pins are in the lent buffers;
        `draw` (0..1) breaks ties. Returns (i, cached tokens, reason, predicted wait and prefill in seconds), and notes
        the new `lost`.
        """
        cdef int64_t candidates[MAX_CANDIDATES]
        cdef int64_t place[MAX_CANDIDATES]
        cdef int64_t i, n = 0
        cdef Picked picked
        if len(slots) > MAX_CANDIDATES or len(loads) != len(slots):
            raise ValueError("too many candidates, or as many loads as slots are needed")
        for i in range(len(slots)):
            if <int64_t> loads[i] >= 0:
                candidates[n], place[n] = slots[i], i
                n += 1
        self._pick(
            candidates, n, prompt_tokens, total_chars, now, theta, theta_gain, gamma, kappa_s, draw, &picked
        )
        return place[picked.place], picked.cached, picked.reason, picked.wait_s, picked.prefill_s

    cdef int _pick(
        self, const int64_t *candidates, int64_t n, int64_t prompt_tokens, int64_t total_chars, double now,
        double theta, double theta_gain, double gamma, double kappa_s, double draw, Picked *picked,
    ) except -1:
        """`choose` among `candidates[0..n)`, worker slots, at most MAX_CANDIDATES."""
        cdef double cost[MAX_CANDIDATES]
        cdef uint64_t *matched = <uint64_t *> self.matched.buf
        cdef int64_t i, worker, best = 0, tied = 0, wanted
        cdef int64_t cached = 0
        cdef uint64_t most = 0, least = <uint64_t> -1, known = 0
        cdef double prefill_s = 0.0, lowest = 0.0, lost = self._lost_with(total_chars)
        if not 0 < n <= MAX_CANDIDATES:
            raise ValueError(f"{n} candidates")
        theta = 1 + theta + theta_gain * lost
        for i in range(n):
            worker = candidates[i]
            if i == 0 or matched[worker] != known:
                known = matched[worker]  # most candidates match as much as the one before, mostly nothing
                cached = self._cached(known, prompt_tokens, total_chars)
                prefill_s = self._seconds(prompt_tokens - cached, cached)
            cost[i] = self._expected_cost(worker, prompt_tokens, prefill_s, now, theta, gamma, kappa_s)
            if i == 0 or cost[i] < lowest:
                lowest, tied = cost[i], 1
            elif cost[i] == lowest:
                tied += 1
            most = max(most, matched[worker])
            least = min(least, matched[worker])
        wanted = <int64_t> (draw * tied) if tied > 1 else 0
        for i in range(n):
            if cost[i] == lowest:
                if wanted == 0:
                    best = i
                    break
                wanted -= 1
        worker = candidates[best]
        picked.place = best
        picked.cached = self._cached(matched[worker], prompt_tokens, total_chars)
        if n == 1:
            picked.reason = ONLY_ELIGIBLE
        elif matched[worker] < most:
            picked.reason = SPILL
        else:
            picked.reason = PREFIX if matched[worker] > least else LOAD
        picked.wait_s = self._wait(worker, now)
        picked.prefill_s = self._seconds(prompt_tokens - picked.cached, picked.cached)
        (<double *> self.word)[H_LOST] = lost
        return 0

    cdef double _expected_cost(
        self, int64_t worker, int64_t prompt_tokens, double prefill_s, double now, double theta, double gamma,
        double kappa_s,
    ) except? -1.0:
        """`prefill_s`: predicted for this request there."""
        cdef int64_t *row = self._worker(worker)
        cdef double *header = <double *> self.word
        cdef int64_t capacity = row[W_KV_CHARS]
        cdef double wait = 0.0, memory = 0.0, price = 0.0, pinned, need
        if row[W_FIRST] >= 0:
            if self._booking(row[W_FIRST])[B_IS_BLIND]:
                self._ripen(worker, now)
            wait = self._wait(worker, now)
        if capacity:
            pinned = (<uint64_t *> self.pinned.buf)[worker] + row[W_RESERVED]
            need = (prompt_tokens + header[H_OUTPUT_MEAN]) * CHARS_PER_TOKEN
            price = kappa_s * pinned / capacity
            if pinned > 0 and pinned + need > capacity:
                memory = header[H_STAY] * fmin((pinned + need - capacity) / pinned, MOST_STAYS)
        return wait + memory + price + (theta + gamma * row[W_DECODING]) * prefill_s

    cdef int64_t _cached(self, uint64_t matched, int64_t prompt_tokens, int64_t total_chars) noexcept:
        """Believed cached tokens; engines compute at least one."""
        if not matched:
            return 0
        return min(<int64_t> (<double> prompt_tokens * <double> matched / <double> total_chars), prompt_tokens - 1)

    cdef int64_t _reserved_fit(self, int64_t worker) except -2:
        """Characters of cache that outputs in flight leave; 0 = the capacity is not known."""
        cdef int64_t *row = self._worker(worker)
        return max(row[W_KV_CHARS] - row[W_RESERVED], <int64_t> 1) if row[W_KV_CHARS] else 0

    @property
    def prefills_seen(self) -> int:
        return self.word[H_SEEN]

    # --- what outlives the daemon

    def costs(self) -> dict:
        """All that was learned of the fleet: the cost model, lengths and stays of answers, the share of lost blocks."""
        return {
            name: self.word[word] if is_count else (<double *> self.word)[word] for name, word, is_count in _COSTS
        }

    def recall_costs(self, costs):
        """What `costs` told. Raises ValueError, before anything changed, unless it has all names and finite numbers."""
        cdef int64_t word
        if {name for name, _, _ in _COSTS} != costs.keys() or not all(isfinite(value) for value in costs.values()):
            raise ValueError("these are no costs")
        for name, word, is_count in _COSTS:
            if is_count:
                self.word[word] = <int64_t> costs[name]
            else:
                (<double *> self.word)[word] = costs[name]

    def pace(self, int64_t worker) -> tuple:
        """What was learned of one worker: smoothed seconds per output token, and of how many answers."""
        return self.tpot_s(worker), self._worker(worker)[W_TPOT_SEEN]

    def recall_pace(self, int64_t worker, double tpot_s, int64_t seen):
        """What `pace` told. Raises ValueError for what it cannot have told."""
        cdef int64_t *row = self._worker(worker)
        if not (isfinite(tpot_s) and tpot_s > 0 and seen > 0):
            raise ValueError("this is no pace")
        (<double *> row)[W_TPOT], row[W_TPOT_SEEN] = tpot_s, seen

    # --- inside

    cdef int64_t _free(self, int64_t shard) except -2:
        """A free slot of the shard: after the one taken last, where it most likely is."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"no shard {shard}")
        cdef int64_t start = self.hints[shard], offset, number
        for offset in range(self.per_shard):
            number = shard * self.per_shard + (start + offset) % self.per_shard
            if self.word[self.first_booking + number * BOOKING_WORDS + B_STATE] == FREE:
                self.hints[shard] = (start + offset + 1) % self.per_shard
                return number
        return NONE

    cdef int _count(self, int64_t number) except -1:
        cdef int64_t *booking = self._booking(number)
        cdef int64_t *worker = self._worker(booking[B_WORKER])
        worker[W_IN_FLIGHT] += 1
        worker[W_TOKENS] += booking[B_PROMPT]
        worker[W_RESERVED] += booking[B_RESERVED]
        return 0

    cdef int _enter(self, int64_t number, double now) except -1:
        """Count a pending booking, at the end of its worker's line."""
        cdef int64_t *booking = self._booking(number)
        cdef int64_t *worker = self._worker(booking[B_WORKER])
        self._count(number)
        booking[B_BEFORE], booking[B_AFTER] = worker[W_LAST], NONE
        if worker[W_LAST] >= 0:
            self._booking(worker[W_LAST])[B_AFTER] = number
        else:
            worker[W_FIRST] = number
            (<double *> worker)[W_HEAD_S] = now
        worker[W_LAST] = number
        (<double *> worker)[W_WAIT_S] += (<double *> booking)[B_PREFILL_S]
        worker[W_QUEUED_TOKENS] += booking[B_NEW]
        return 0

    cdef int _leave_line(self, int64_t number, double now) except -1:
        cdef int64_t *booking = self._booking(number)
        cdef int64_t *worker = self._worker(booking[B_WORKER])
        if booking[B_BEFORE] >= 0:
            self._booking(booking[B_BEFORE])[B_AFTER] = booking[B_AFTER]
        else:
            worker[W_FIRST] = booking[B_AFTER]
        if booking[B_AFTER] >= 0:
            self._booking(booking[B_AFTER])[B_BEFORE] = booking[B_BEFORE]
        else:
            worker[W_LAST] = booking[B_BEFORE]
        worker[W_QUEUED_TOKENS] -= booking[B_NEW]
        (<double *> worker)[W_WAIT_S] -= (<double *> booking)[B_PREFILL_S]
        (<double *> worker)[W_HEAD_S] = now
        if worker[W_FIRST] < 0:
            (<double *> worker)[W_WAIT_S] = 0.0  # what rounding left
        return 0

    cdef double _seconds(self, double new, double context) noexcept:
        cdef double *number = <double *> self.word
        cdef double pairs = new * (context + new / 2)
        return number[H_BASE_S] + number[H_PER_TOKENS] * (new / TOKENS) + number[H_PER_PAIRS] * (pairs / PAIRS)

    cdef void _learn(self, double new, double context, double seconds) noexcept:
        """Recursive least squares with forgetting; see routing.cost_model."""
        cdef double *n = <double *> self.word
        cdef double x0, x1, g0, g1, scale, k0, k1, error, forgetting
        if not isfinite(seconds) or seconds < 0 or new <= 0:
            return
        x0, x1 = new / TOKENS, new * (context + new / 2) / PAIRS
        g0, g1 = n[H_P00] * x0 + n[H_P01] * x1, n[H_P01] * x0 + n[H_P11] * x1
        scale = FORGETTING + x0 * g0 + x1 * g1
        k0, k1 = g0 / scale, g1 / scale
        error = seconds - n[H_BASE_S] - n[H_SLOPE_TOKENS] * x0 - n[H_SLOPE_PAIRS] * x1
        n[H_SLOPE_TOKENS] += k0 * error
        n[H_SLOPE_PAIRS] += k1 * error
        n[H_PER_TOKENS] = fmax(n[H_SLOPE_TOKENS], LEAST_SLOPE)
        n[H_PER_PAIRS] = fmax(n[H_SLOPE_PAIRS], 0.0)
        forgetting = FORGETTING if n[H_P00] + n[H_P11] < MOST_DOUBT else 1.0
        n[H_P00] = (n[H_P00] - k0 * g0) / forgetting
        n[H_P01] = (n[H_P01] - k0 * g1) / forgetting
        n[H_P11] = (n[H_P11] - k1 * g1) / forgetting
        self.word[H_SEEN] += 1

    cdef void _smooth(self, int64_t *mean, double sample) noexcept:
        """A mean that is exact at first and forgets later; its count is the word behind it."""
        cdef double *value = <double *> mean
        mean[1] += 1
        value[0] += fmax(1.0 / mean[1], LEAST_WEIGHT) * (sample - value[0])

    cdef void _serve(self, int64_t *worker, double tokens, double now) noexcept:
        cdef double *real = <double *> worker
        real[W_SERVED] = real[W_SERVED] * exp2(-fmax(now - real[W_SERVED_AT], 0.0) / RATE_HALF_LIFE_S) + tokens
        real[W_SERVED_AT] = now

    cdef double _busy(self, int64_t *worker, double now) noexcept:
        cdef double *real = <double *> worker
        cdef double decay = exp2(-fmax(now - real[W_BUSY_AT], 0.0) / RATE_HALF_LIFE_S)
        return real[W_BUSY_S] * decay + (1 - decay if worker[W_IN_FLIGHT] else 0.0)

    cdef void _mark_busy(self, int64_t *worker, double now) noexcept:
        """Before the number of requests in flight changes."""
        (<double *> worker)[W_BUSY_S] = self._busy(worker, now)
        (<double *> worker)[W_BUSY_AT] = now
