"""Where a machine keeps its state: a row of 64-bit words, in shared memory or in a plain buffer.

Theory of operation. The machines of this package hold settings only. What changes lives in words that the caller hands
in together with `now`, so that all shards share it:

* the caller holds the mutex of the row for the whole of every call; no call waits for anything;
* words that are all zero are the valid first state of every machine: nothing has to be initialised, and a row is reset
  by filling it with zeros;
* a process may die between any two stores. The machines store in such an order that what it leaves is a state that they
  could have been in, at worst with one event uncounted or a permit out that comes back (`tests/…/test_torn_writes.py`);
* `now` is seconds of the monotonic clock, one clock for all processes of a host. It may be a little older than that of
  the call before (read before the mutex was had): time then stands still, it never runs backwards.
"""

from __future__ import annotations

from typing import Protocol

WORD_BYTES = 8


class Words(Protocol):
    """Words of 8 bytes, each used either as a signed integer or as a double."""

    def get_int(self, index: int, /) -> int: ...

    def set_int(self, index: int, value: int, /) -> None: ...

    def get_real(self, index: int, /) -> float: ...

    def set_real(self, index: int, value: float, /) -> None: ...


class Rng(Protocol):
    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


class MemoryWords:
    """Words of a buffer, seen as integers and as doubles at once. Raises IndexError outside of it.

    For a row of the segment: `MemoryWords(segment.cells[first:end], segment.reals[first:end])`.
    """

    __slots__ = ("_ints", "_reals")

    def __init__(self, ints: memoryview[int], reals: memoryview[float]) -> None:
        self._ints = ints
        self._reals = reals

    def get_int(self, index: int, /) -> int:
        return self._ints[index]

    def set_int(self, index: int, value: int, /) -> None:
        self._ints[index] = value

    def get_real(self, index: int, /) -> float:
        return self._reals[index]

    def set_real(self, index: int, value: float, /) -> None:
        self._reals[index] = value


def private_words(count: int) -> MemoryWords:
    """`count` zeroed words of this process alone: for tests, dry runs and simulations."""
    memory = memoryview(bytearray(count * WORD_BYTES))
    return MemoryWords(memory.cast("q"), memory.cast("d"))
