"""Sampled decisions with all their numbers, as JSON: a ring of bytes per shard in the segment.

A record is a head of five words (sequence number, size, key of the request id, Unix microseconds, position of the
record before it, -1 = none) and the JSON, padded to whole words. The writer moves `next` on before it writes over old
records; a reader walks back from the newest one and stops where the bytes may have been written over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

_HEAD = struct.Struct("=QQQQq")
RING_BYTES = at.EXPLANATION_WORDS * at.WORD - 64
_WRITTEN, _LAST = 0, 1
"""words before the ring: bytes ever reserved, and where the newest record begins (in bytes ever written, -1 = none)"""


@dataclass(frozen=True, slots=True)
class ExplanationRecord:
    request_key: int
    at_us: int
    json: bytes


class ExplanationLog:
    """The write side of one shard."""

    def __init__(self, segment: Segment, shard: int) -> None:
        self._cells = segment.cells
        self._memory = segment.bytes
        self._first = segment.layout.explanation_ring(shard)
        self._number = 0
        if not self._cells[self._first + _WRITTEN]:
            self._cells[self._first + _LAST] = -1

    def note(self, request_key: int, at_us: int, text: bytes) -> None:
        """Too large a text (a quarter of the ring) is left out."""
        size = _HEAD.size + -(-len(text) // at.WORD) * at.WORD
        if size > RING_BYTES // 4:
            return
        cells, first = self._cells, self._first
        start = cells[first + _WRITTEN]
        if start % RING_BYTES + size > RING_BYTES:  # a record lies in one piece
            start += RING_BYTES - start % RING_BYTES
        last = cells[first + _LAST]
        cells[first + _WRITTEN] = start + size
        offset = self._offset(start)
        self._number += 1
        _HEAD.pack_into(self._memory, offset, self._number, len(text), request_key, at_us, last)
        self._memory[offset + _HEAD.size : offset + _HEAD.size + len(text)] = text
        cells[first + _LAST] = start

    def _offset(self, position: int) -> int:
        return self._first * at.WORD + 64 + position % RING_BYTES


def read_explanations(segment: Segment, shard: int) -> Iterator[ExplanationRecord]:
    """From the newest to the oldest that the ring still holds."""
    cells, memory = segment.cells, segment.bytes
    first = segment.layout.explanation_ring(shard)
    base = first * at.WORD + 64
    position = cells[first + _LAST] if cells[first + _WRITTEN] else -1
    while position >= 0:
        offset = base + position % RING_BYTES
        _, size, key, at_us, before = _HEAD.unpack_from(memory, offset)
        text = bytes(memory[offset + _HEAD.size : offset + _HEAD.size + min(size, RING_BYTES)])
        if cells[first + _WRITTEN] - position > RING_BYTES:
            return  # written over meanwhile
        yield ExplanationRecord(key, at_us, text)
        if before >= position:
            return
        position = before
