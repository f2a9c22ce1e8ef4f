"""Pieces of a request body, without an object for each: what a scan found, as the prefix index hashes it.

Made by `daemon.routing.body`, read natively by `HashChain`. To Python it is an iterable of memoryviews: JSON values as
they stand in the body, and token ids of four bytes each, which are kept beside it.
"""
cimport cython
from cpython.mem cimport PyMem_Free


@cython.freelist(64)
cdef class Spans:
    def __dealloc__(self):
        PyMem_Free(self.span)

    def __len__(self):
        return self.n

    def __getitem__(self, Py_ssize_t i):
        cdef json_span span
        if not 0 <= i < <Py_ssize_t> self.n:
            raise IndexError(f"no span {i}")
        span = self.span[i]
        return memoryview(self.ids if span.kind == JSON_IDS else self.body)[span.at:span.at + span.size]
