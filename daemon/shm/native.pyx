"""The operations on the shared segment that must be atomic, locked or cheap.

The routing mutex is a process-shared robust pthread mutex. A holder that dies is noticed by the next one, which makes
it consistent, and that is counted: what the mutex guards is kept valid at every step (single words), so there is
nothing else to repair. A holder that is merely stopped is not noticed by the kernel, so `lock` gives up after its
deadline; the caller then decides by the lock-free counters. `H_LOCK_TIMEOUTS` counts those.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from pointsman.daemon.shm import layout as _layout

cdef extern from "<errno.h>" nogil:
    int EBUSY, EOWNERDEAD, ETIMEDOUT

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *when)
    int CLOCK_MONOTONIC

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutexattr_t:
        pass
    int PTHREAD_PROCESS_SHARED
    int PTHREAD_MUTEX_ROBUST
    int pthread_mutexattr_init(pthread_mutexattr_t *attr)
    int pthread_mutexattr_destroy(pthread_mutexattr_t *attr)
    int pthread_mutexattr_setpshared(pthread_mutexattr_t *attr, int shared)
    int pthread_mutexattr_setrobust(pthread_mutexattr_t *attr, int robust)
    int pthread_mutex_init(pthread_mutex_t *mutex, pthread_mutexattr_t *attr)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_clocklock(pthread_mutex_t *mutex, int clock, timespec *deadline)
    int pthread_mutex_consistent(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long argument, ...)
    int PR_SET_PDEATHSIG
    int PR_GET_PDEATHSIG
    int PR_SET_NAME

cdef extern from "<malloc.h>" nogil:
    int mallopt(int parameter, int value)
    int M_TRIM_THRESHOLD
    int M_TOP_PAD
    int M_MMAP_THRESHOLD

cdef extern from *:
    """
    #include <stdint.h>
    static inline int64_t word_load(int64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void word_store(int64_t *p, int64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int64_t word_add(int64_t *p, int64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
    static inline int64_t word_relaxed(int64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    #if defined(__x86_64__) || defined(__i386__)
    #define idle() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define idle() __asm__ volatile("isb")
    #else
    #define idle() __asm__ volatile("")
    #endif
    """
    void idle() nogil
    int64_t word_load(int64_t *p) nogil
    void word_store(int64_t *p, int64_t v) nogil
    int64_t word_add(int64_t *p, int64_t v) nogil
    int64_t word_relaxed(int64_t *p) nogil

cdef enum:
    MAX_MUTEX_BYTES = 64
    SPINS = 4

cdef int64_t STATUS_UP = _layout.STATUS_UP
cdef int64_t LOAD_WORDS = _layout.LOAD_WORDS
cdef int64_t WORKER_WORDS = _layout.WORKER_WORDS
cdef int64_t W_CLOSE_AT_MS = _layout.W_CLOSE_AT_MS
cdef int64_t L_INFLIGHT = _layout.L_INFLIGHT
cdef int64_t L_INFLIGHT_BYTES = _layout.L_INFLIGHT_BYTES
cdef int64_t L_PICKS = _layout.L_PICKS
cdef int64_t H_GENERATION = _layout.H_GENERATION
cdef int64_t H_CURSOR = _layout.H_CURSOR
cdef int64_t H_MUTEX = _layout.H_MUTEX
cdef int64_t H_LOCK_TIMEOUTS = _layout.H_LOCK_TIMEOUTS
cdef int64_t H_LOCK_WAITS = _layout.H_LOCK_WAITS
cdef int64_t H_LOCK_RECOVERIES = _layout.H_LOCK_RECOVERIES

cdef int64_t HISTOGRAM_COUNT = _layout.HISTOGRAM_COUNT
cdef int64_t HISTOGRAM_SUM_US = _layout.HISTOGRAM_SUM_US
cdef int64_t BUCKETS = len(_layout.BUCKETS_S)
cdef double bucket_s[32]
if BUCKETS >= HISTOGRAM_COUNT or BUCKETS > 32:
    raise ImportError("layout.py has more buckets than a histogram has room for")
for _i in range(BUCKETS):
    bucket_s[_i] = _layout.BUCKETS_S[_i]


cdef class Words:
    """The segment's memory, seen as words; `loads` and `workers` are the layout's offsets."""

    def __cinit__(self, buffer, int64_t shards, int64_t slots, int64_t loads, int64_t workers):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.attached = True
        self.word = <int64_t *> self.view.buf
        self.mutex = <pthread_mutex_t *> (self.word + H_MUTEX)
        self.shards, self.slots, self.loads, self.workers = shards, slots, loads, workers

    def __dealloc__(self):
        if self.attached:
            PyBuffer_Release(&self.view)

    cdef int64_t *_load(self, int64_t shard, int64_t slot) except NULL:
        if not (0 <= shard < self.shards and 0 <= slot < self.slots):
            raise IndexError(f"no load row for shard {shard}, slot {slot}")
        return self.word + self.loads + (shard * self.slots + slot) * LOAD_WORDS

    # --- the routing mutex

    def init_mutex(self):
        """Only by the segment's creator, before anybody else attaches."""
        cdef pthread_mutexattr_t attr
        if sizeof(pthread_mutex_t) > MAX_MUTEX_BYTES:
            raise MemoryError("pthread_mutex_t is larger than its place in the header")
        pthread_mutexattr_init(&attr)
        pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED)
        pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST)
        cdef int code = pthread_mutex_init(self.mutex, &attr)
        pthread_mutexattr_destroy(&attr)
        if code:
            raise OSError(code, "pthread_mutex_init")

    def lock(self, int64_t deadline_us=2000) -> bool:
        """True when held. False after `deadline_us`: decide without it."""
        return self._lock(deadline_us)

    cdef bint _lock(self, int64_t deadline_us) except -1:
        cdef timespec until
        cdef int code = pthread_mutex_trylock(self.mutex), turn, i
        if code == EBUSY:
            word_add(self.word + H_LOCK_WAITS, 1)
            for turn in range(SPINS):  # it is held for a microsecond or two; to sleep and be woken costs more
                for i in range(8 << turn):
                    idle()
                code = pthread_mutex_trylock(self.mutex)
                if code != EBUSY:
                    break
        if code == EBUSY:
            clock_gettime(CLOCK_MONOTONIC, &until)
            until.tv_nsec += deadline_us * 1000
            until.tv_sec += until.tv_nsec // 1000000000
            until.tv_nsec %= 1000000000
            with nogil:
                code = pthread_mutex_clocklock(self.mutex, CLOCK_MONOTONIC, &until)
        if code == EOWNERDEAD:
            pthread_mutex_consistent(self.mutex)
            word_add(self.word + H_LOCK_RECOVERIES, 1)
            code = 0
        if code == ETIMEDOUT:
            word_add(self.word + H_LOCK_TIMEOUTS, 1)
            return False
        if code:
            raise OSError(code, "pthread_mutex_clocklock")
        return True

    def unlock(self):
        self._unlock()

    cdef int _unlock(self) except -1:
        cdef int code = pthread_mutex_unlock(self.mutex)
        if code:
            raise OSError(code, "pthread_mutex_unlock")
        return 0

    # --- single words

    cpdef int64_t generation(self) noexcept:
        return word_load(self.word + H_GENERATION)

    def next_cursor(self) -> int:
        """The shared round-robin cursor: every call on any process gets another number."""
        return word_add(self.word + H_CURSOR, 1)

    cpdef int64_t get(self, int64_t index) noexcept:
        return word_load(self.word + index)

    cpdef void put(self, int64_t index, int64_t value) noexcept:
        word_store(self.word + index, value)

    cpdef void add(self, int64_t index, int64_t value) noexcept:
        """Only for words whose one writer is the caller; a plain store, but readers never see a torn word."""
        word_store(self.word + index, word_relaxed(self.word + index) + value)

    cpdef double get_real(self, int64_t index) noexcept:
        """The same word, read as a double."""
        cdef int64_t bits = word_load(self.word + index)
        cdef double value
        memcpy(&value, &bits, sizeof(value))
        return value

    cpdef void observe(self, int64_t row, double seconds) noexcept:
        """Into the histogram at `row`, of which the caller is the one writer."""
        cdef int64_t i = 0
        while i < BUCKETS and bucket_s[i] < seconds:
            i += 1
        self.add(row + i, 1)
        self.add(row + HISTOGRAM_COUNT, 1)
        self.add(row + HISTOGRAM_SUM_US, <int64_t> (seconds * 1e6))

    def fill_zero(self, int64_t index, int64_t count):
        if index < 0 or count < 0 or (index + count) * 8 > self.view.len:
            raise IndexError("outside the segment")
        memset(self.word + index, 0, count * 8)

    cpdef int64_t column(self, int64_t first, int64_t stride, int64_t count) except? -1:
        """The sum of `count` words, `stride` apart: one gauge over all shards."""
        cdef int64_t i, sum = 0
        if first < 0 or stride < 0 or count < 0 or (first + stride * count) * 8 > self.view.len:
            raise IndexError("outside the segment")
        for i in range(count):
            sum += word_load(self.word + first + i * stride)
        return sum

    # --- load rows

    def book(self, int64_t shard, int64_t slot, int64_t prompt_bytes):
        self._book(shard, slot, prompt_bytes)

    cdef int _book(self, int64_t shard, int64_t slot, int64_t prompt_bytes) except -1:
        cdef int64_t *row = self._load(shard, slot)
        word_store(row + L_INFLIGHT, word_relaxed(row + L_INFLIGHT) + 1)
        word_store(row + L_INFLIGHT_BYTES, word_relaxed(row + L_INFLIGHT_BYTES) + prompt_bytes)
        word_store(row + L_PICKS, word_relaxed(row + L_PICKS) + 1)
        return 0

    def release(self, int64_t shard, int64_t slot, int64_t prompt_bytes):
        self._release(shard, slot, prompt_bytes)

    cdef int _release(self, int64_t shard, int64_t slot, int64_t prompt_bytes) except -1:
        cdef int64_t *row = self._load(shard, slot)
        word_store(row + L_INFLIGHT, word_relaxed(row + L_INFLIGHT) - 1)
        word_store(row + L_INFLIGHT_BYTES, word_relaxed(row + L_INFLIGHT_BYTES) - prompt_bytes)
        return 0

    cdef bint _is_up(self, int64_t slot) except -1:
        if not 0 <= slot < self.slots:
            raise IndexError(f"no worker slot {slot}")
        return word_load(self.word + self.workers + slot * WORKER_WORDS) == STATUS_UP

    cdef int64_t _in_flight(self, int64_t slot) except -2:
        """Over all shards, -1 where the worker is not up."""
        cdef int64_t shard, sum = 0
        if not self._is_up(slot):
            return -1
        for shard in range(self.shards):
            sum += word_load(self._load(shard, slot) + L_INFLIGHT)
        return sum if sum > 0 else 0

    def total(self, int64_t slot, int64_t word) -> int:
        """One load word of a worker, added up over the shards."""
        cdef int64_t shard, sum = 0
        if not (0 <= word < LOAD_WORDS):
            raise IndexError("no such load word")
        for shard in range(self.shards):
            sum += word_load(self._load(shard, slot) + word)
        return sum

    def closing(self, int64_t shard, int64_t now_ms) -> list:
        """Slots whose requests are to end by now, and that have some on this shard."""
        cdef int64_t slot, close_at
        cdef list found = []
        for slot in range(self.slots):
            close_at = word_load(self.word + self.workers + slot * WORKER_WORDS + W_CLOSE_AT_MS)
            if close_at and close_at <= now_ms and word_load(self._load(shard, slot) + L_INFLIGHT) > 0:
                found.append(slot)
        return found

    def survey(self, tuple slots) -> list:
        """For each slot the requests in flight over all shards, or -1 where the worker is not up."""
        cdef int64_t slot
        return [self._in_flight(slot) for slot in slots]


cpdef double monotonic() noexcept:
    """time.monotonic, without an object for the number."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef uint64_t hash_bytes(const unsigned char *p, Py_ssize_t size) noexcept nogil:
    """FNV-1a and a finaliser: for tables and logs, where nobody gains by a collision."""
    cdef uint64_t value = <uint64_t> 0xCBF29CE484222325
    cdef Py_ssize_t i
    for i in range(size):
        value = (value ^ p[i]) * <uint64_t> 0x100000001B3
    value = (value ^ (value >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    return (value ^ (value >> 27)) >> 1


def key_of_bytes(bytes text not None) -> int:
    """A 63-bit hash, the same in every process."""
    return hash_bytes(<const unsigned char *> <char *> text, len(text))


def die_with_parent(int signal_number):
    """Linux sends `signal_number` to this process when the process that started it ends."""
    if prctl(PR_SET_PDEATHSIG, <unsigned long> signal_number):
        raise OSError("prctl(PR_SET_PDEATHSIG)")


def parent_death_signal():
    """The number that `die_with_parent` was called with, also by what this process was before an exec; 0 = none."""
    cdef int signal_number = 0
    prctl(PR_GET_PDEATHSIG, <unsigned long> &signal_number)
    return signal_number


def keep_freed_memory(int kept_bytes, int mapped_from_bytes):
    """The allocator gives memory at the heap's end back to the kernel only beyond `kept_bytes`, and maps single blocks
    only from `mapped_from_bytes`. Without it a process that holds bodies of 32 KiB for a moment gives their pages back
    and faults them in again with every request."""
    mallopt(M_TRIM_THRESHOLD, kept_bytes)
    mallopt(M_TOP_PAD, kept_bytes >> 6)
    mallopt(M_MMAP_THRESHOLD, mapped_from_bytes)


def name_process(str name):
    """What `ps -o comm` and `top` show; at most 15 bytes."""
    cdef bytes encoded = name.encode()[:15]
    prctl(PR_SET_NAME, <unsigned long> <char *> encoded)
