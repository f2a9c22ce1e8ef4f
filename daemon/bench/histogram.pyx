"""Durations counted in buckets whose width grows with the value: any number of samples in 36 KiB.

Each power of two is cut into 2 ** sub_bits buckets, so a quantile is off by at most 2 ** -sub_bits of its value (0.8 % by
default); values below 2 ** sub_bits are exact, those above 2 ** 42 (73 minutes in nanoseconds) count as that.
"""
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.math cimport ceil
from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    int __builtin_clzll(unsigned long long) noexcept nogil

cdef enum:
    MOST_BITS = 42

SUB_BITS = 7
MOST = (<int64_t> 1 << MOST_BITS) - 1


cdef class Histogram:
    """Of integers; negative ones count as 0. `least` and `most` are 0 while it is empty."""

    def __cinit__(self, int sub_bits=SUB_BITS):
        if not 1 <= sub_bits <= 10:
            raise ValueError("sub_bits is 1 to 10")
        self.sub_bits = sub_bits
        self._size = (MOST_BITS - sub_bits + 1) << sub_bits
        self._counts = <uint64_t *> PyMem_Calloc(self._size, sizeof(uint64_t))
        if self._counts == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self._counts)

    cdef Py_ssize_t _index(self, int64_t value) noexcept:
        cdef int shift
        if value < (1 << self.sub_bits):
            return value
        shift = 63 - __builtin_clzll(value) - self.sub_bits
        return ((<Py_ssize_t> shift + 1) << self.sub_bits) + ((value >> shift) - (1 << self.sub_bits))

    cpdef void record(self, int64_t value) noexcept:
        if value < 0:
            value = 0
        elif value >= (<int64_t> 1 << MOST_BITS):
            value = (<int64_t> 1 << MOST_BITS) - 1
        self._counts[self._index(value)] += 1
        if self.count == 0 or value < self.least:
            self.least = value
        if value > self.most:
            self.most = value
        self.count += 1
        self.total += value

    def merge(self, Histogram other not None):
        """Raises ValueError when the other one's buckets are not the same."""
        cdef Py_ssize_t i
        if other.sub_bits != self.sub_bits:
            raise ValueError("histograms of different resolution")
        if other.count == 0:
            return
        for i in range(self._size):
            self._counts[i] += other._counts[i]
        self.least = other.least if self.count == 0 else min(self.least, other.least)
        self.most = max(self.most, other.most)
        self.count += other.count
        self.total += other.total

    @property
    def mean(self):
        return self.total / self.count if self.count else 0.0

    def quantile(self, double share):
        """The value that this share of the samples does not exceed, 0.0 when there are none."""
        cdef int64_t rank, seen = 0
        cdef Py_ssize_t i
        if self.count == 0:
            return 0.0
        rank = max(<int64_t> ceil(share * self.count), 1)
        if rank >= self.count:
            return float(self.most)
        for i in range(self._size):
            seen += self._counts[i]
            if seen >= rank:
                low, high = self.bounds(i)
                return float(min(max((low + high - 1) / 2, self.least), self.most))
        return float(self.most)

    def bounds(self, Py_ssize_t index):
        """The values that bucket `index` counts: from the first up to, without, the second."""
        cdef Py_ssize_t octave
        cdef int64_t low
        if not 0 <= index < self._size:
            raise ValueError("no such bucket")
        octave = index >> self.sub_bits
        if octave == 0:
            return index, index + 1
        low = <int64_t> ((index & ((1 << self.sub_bits) - 1)) + (1 << self.sub_bits)) << (octave - 1)
        return low, low + (<int64_t> 1 << (octave - 1))

    def buckets(self):
        """[(index, count)] of those that hold something, in rising order."""
        cdef Py_ssize_t i
        return [(i, self._counts[i]) for i in range(self._size) if self._counts[i]]

    @staticmethod
    def restore(int sub_bits, buckets, int64_t total, int64_t least, int64_t most):
        """What `buckets` and the readable figures tell, as a histogram again. Raises ValueError for an impossible bucket."""
        cdef Histogram made = Histogram(sub_bits)
        cdef Py_ssize_t index
        for index, count in buckets:
            made.bounds(index)
            if count < 0:
                raise ValueError("a negative count")
            made._counts[index] += count
            made.count += count
        made.total, made.least, made.most = total, least, most
        return made
