"""Shared memory by huge pages, as far as the kernel has them.

Memory that is read at random places, as a hash table is, misses the TLB at nearly every one of them when its pages have
4 KiB. Huge pages (2 MiB) are had without privileges and without a setting of the host by MADV_COLLAPSE (Linux 6.1), which
asks two things: the mapping begins at a multiple of their size, where mmap puts it by chance alone; and a page of each
range is there already. Where the kernel has none to give, everything stays as it is, by small pages.
"""
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uintptr_t

import os

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *at, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *at, size_t size)
    int madvise(void *at, size_t size, int advice)
    void *MAP_FAILED
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED
    int MADV_HUGEPAGE

cdef enum:
    # not in every C library's header
    MADV_POPULATE_WRITE = 23  # Linux 5.14
    MADV_COLLAPSE = 25
    HUGE_PAGE = 2 << 20

cdef size_t PAGE = os.sysconf("SC_PAGESIZE")


cdef class Mapping:
    """The first `size` bytes of a file, shared and writable, until the last buffer of it is gone. Raises OSError."""

    cdef unsigned char *memory
    cdef size_t size

    def __cinit__(self, int fd, size_t size):
        cdef size_t reserved = size + HUGE_PAGE
        cdef void *start = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        cdef size_t before, mapped = (size + PAGE - 1) // PAGE * PAGE
        cdef void *memory
        cdef int code
        if start == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        before = (HUGE_PAGE - <uintptr_t> start % HUGE_PAGE) % HUGE_PAGE
        memory = mmap(<char *> start + before, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0)
        if memory == MAP_FAILED:
            code = errno
            munmap(start, reserved)
            raise OSError(code, os.strerror(code))
        self.memory, self.size = <unsigned char *> memory, size
        if before:
            munmap(start, before)
        munmap(self.memory + mapped, reserved - before - mapped)
        madvise(self.memory, size, MADV_HUGEPAGE)

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.size)

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.memory, self.size, False, flags)

    def enlarge_pages(self):
        """Before the memory is first used: make it of huge pages, zeroed, up to the first that is not to be had."""
        cdef size_t i
        cdef unsigned char *start
        for i in range(self.size // HUGE_PAGE):
            start = self.memory + i * HUGE_PAGE
            if madvise(start, PAGE, MADV_POPULATE_WRITE) or madvise(start, HUGE_PAGE, MADV_COLLAPSE):
                break

    def populate(self, size_t start, size_t size):
        """Have the pages of these bytes made, or mapped where they are made; nothing on a kernel that cannot.

        `start` is a multiple of the page size.
        """
        if start % PAGE or start > self.size or size > self.size - start:
            raise ValueError("these are no pages of the mapping")
        madvise(self.memory + start, size, MADV_POPULATE_WRITE)
