"""Shared memory by huge pages: what holds whether or not the kernel has any to give."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from pointsman.daemon.shm.mapping import Mapping

HUGE_PAGE = 2 << 20
SIZE = 3 * HUGE_PAGE + 5 * mmap.PAGESIZE
"""with a tail that no huge page fits into"""


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test-mapping")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def address(mapping: Mapping) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(mapping)))


def test_every_mapping_begins_where_a_huge_page_can(fd: int) -> None:
    mappings = [Mapping(fd, size) for size in (SIZE, mmap.PAGESIZE, SIZE)]
    assert [address(mapping) % HUGE_PAGE for mapping in mappings] == [0, 0, 0]


@pytest.mark.parametrize("is_enlarged", [False, True])
def test_all_mappings_of_a_file_show_the_same_memory(fd: int, is_enlarged: bool) -> None:
    one, other = Mapping(fd, SIZE), Mapping(fd, SIZE)
    if is_enlarged:
        one.enlarge_pages()
    other.populate(0, SIZE)
    assert len(one) == len(memoryview(one)) == SIZE
    assert not any(bytes(one))
    for at in (0, HUGE_PAGE - 1, HUGE_PAGE, SIZE - 1):
        memoryview(one)[at] = 1 + at % 250
        assert memoryview(other)[at] == os.pread(fd, 1, at)[0] == 1 + at % 250


def test_nothing_is_lost_when_pages_in_use_are_enlarged(fd: int) -> None:
    text = os.urandom(SIZE)
    os.pwrite(fd, text, 0)
    mapping = Mapping(fd, SIZE)
    mapping.enlarge_pages()
    assert bytes(mapping) == text


def test_a_buffer_outlives_its_mapping(fd: int) -> None:
    view = memoryview(Mapping(fd, SIZE))
    view[SIZE - 1] = 7
    assert os.pread(fd, 1, SIZE - 1) == b"\7"


def test_what_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Mapping(-1, SIZE)


@pytest.mark.parametrize(("start", "size"), [(1, 0), (0, SIZE + 1), (SIZE + mmap.PAGESIZE, 0), (mmap.PAGESIZE, SIZE)])
def test_only_pages_of_the_mapping_are_populated(fd: int, start: int, size: int) -> None:
    with pytest.raises(ValueError, match="no pages of the mapping"):
        Mapping(fd, SIZE).populate(start, size)
