"""Tables of recently used keys: which worker a session is at, how many tokens a user had lately. Shared by all shards.

Theory of operation. An array of entries of four words: key (a 64-bit hash, 0 = free), number, amount, when. A key may
stand in one of the WAYS entries of its set; a new one takes a free entry, else that which was used longest ago. So
memory is fixed, nothing needs cleaning up, and what is forgotten first is what nobody uses. Keys are hashes: no name
of a user or a session is kept. All methods must be called with the routing mutex held; an entry's key is written last,
so a writer that dies leaves a free entry or a whole one.
"""
from libc.math cimport exp2, fmax
from libc.stdint cimport int64_t, uint64_t
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef enum:
    WAYS = 8
    KEY = 0
    NUMBER = 1
    AMOUNT = 2
    WHEN = 3
    WORDS = 4


cdef class RecentKeys:
    """`buffer` from byte `offset` on holds `entries` entries, a multiple of 8."""

    cdef Py_buffer view
    cdef int64_t *word
    cdef uint64_t entries
    cdef bint attached

    def __cinit__(self, buffer, int64_t offset, uint64_t entries):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.attached = True
        if not entries or entries % WAYS or offset < 0 or offset % 8:
            raise ValueError("a table of recent keys has a multiple of 8 entries, at whole words")
        if self.view.len < offset + <int64_t> (entries * WORDS * 8):
            raise ValueError("the memory is too small for this table")
        self.word = <int64_t *> self.view.buf + offset // 8
        self.entries = entries

    def __dealloc__(self):
        if self.attached:
            PyBuffer_Release(&self.view)

    cdef int64_t *_set(self, uint64_t key) noexcept:
        return self.word + (key % (self.entries // WAYS)) * WAYS * WORDS

    cdef int64_t *_find(self, uint64_t key) noexcept:
        cdef int64_t *entry = self._set(key)
        cdef int way
        for way in range(WAYS):
            if <uint64_t> entry[KEY] == key:
                return entry
            entry += WORDS
        return NULL

    def get(self, uint64_t key):
        """(number, amount, when), None for a key that is not known."""
        cdef int64_t *entry = self._find(key) if key else NULL
        if entry == NULL:
            return None
        return entry[NUMBER], (<double *> entry)[AMOUNT], (<double *> entry)[WHEN]

    def put(self, uint64_t key, int64_t number, double amount, double when):
        """`when`: seconds of the monotonic clock. Raises ValueError for key 0."""
        if not key:
            raise ValueError("0 is no key")
        cdef int64_t *entry = self._find(key)
        cdef int64_t *other
        cdef int way
        if entry == NULL:
            entry = other = self._set(key)
            for way in range(WAYS):
                if not other[KEY]:
                    entry = other
                    break
                if (<double *> other)[WHEN] < (<double *> entry)[WHEN]:
                    entry = other
                other += WORDS
            entry[KEY] = 0
        entry[NUMBER] = number
        (<double *> entry)[AMOUNT], (<double *> entry)[WHEN] = amount, when
        entry[KEY] = <int64_t> key

    def forget_number(self, int64_t number) -> int:
        """Drops all keys with that number; returns how many."""
        cdef int64_t *entry = self.word
        cdef uint64_t i
        cdef int64_t dropped = 0
        for i in range(self.entries):
            if entry[KEY] and entry[NUMBER] == number:
                entry[KEY] = 0
                dropped += 1
            entry += WORDS
        return dropped

    def range(self, double now, double half_life_s) -> tuple:
        """(least, most) amount of all keys, each halved every `half_life_s` since its last use; zeros when there is none."""
        cdef int64_t *entry = self.word
        cdef uint64_t i
        cdef double least = 0.0, most = 0.0, amount
        cdef bint is_first = True
        for i in range(self.entries):
            if entry[KEY]:
                amount = (<double *> entry)[AMOUNT] * exp2(-fmax(now - (<double *> entry)[WHEN], 0.0) / half_life_s)
                if is_first or amount < least:
                    least = amount
                if is_first or amount > most:
                    most = amount
                is_first = False
            entry += WORDS
        return least, most

    def __len__(self):
        cdef uint64_t i
        cdef int64_t count = 0
        for i in range(self.entries):
            count += self.word[i * WORDS + KEY] != 0
        return count
