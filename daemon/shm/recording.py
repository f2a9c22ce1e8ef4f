"""The traffic while somebody records it: a ring of bytes per shard in the segment, drained by control.

Theory of operation. `H_RECORDING` says until when requests are taken up (0 = nobody records: that one word is all that
a request costs then). At its pick a request's block hashes are copied (the chain's memory belongs to the next request),
at its end one record goes into the ring (times of the monotonic clock):

    size, bytes | arrival, us | characters | prompt tokens | output tokens | model | streamed | status | hashes

all words of 8 bytes; UNKNOWN where nobody told. A record lies in one piece: where it would not fit before the ring's
end, a word of 0 says that it begins at the front. Before the ring stand its words, each with one writer: the shard's
count of bytes written, of requests taken up, ended and lost, and control's count of bytes read. The writer never
overwrites what was not read: a record without room is dropped and counted. A shard may be killed anywhere: what it was
writing was not published, and its successor counts as lost what it had taken up. No text: hashes and numbers.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.segment import Segment

UNKNOWN = -1
_HEAD = struct.Struct("=8q")
_WORDS_BEFORE = 8
_WRITTEN, _BEGUN, _ENDED, _LOST, _READ = range(5)
RING_BYTES = (at.RECORDING_WORDS - _WORDS_BEFORE) * at.WORD
MAX_RECORD_BYTES = RING_BYTES // 4
"""About 16 MiB of prompt in blocks of 512 bytes; a longer one is lost, and counted."""


class Taken:
    """What is kept of a request from its pick to its end."""

    __slots__ = ("arrived_us", "hashes", "total_chars")

    def __init__(self, arrived_us: int, total_chars: int, hashes: bytes) -> None:
        self.arrived_us = arrived_us
        self.total_chars = total_chars
        self.hashes = hashes


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    arrived_us: int
    """of the monotonic clock"""
    total_chars: int
    """of the prompt, bytes of its text"""
    prompt_tokens: int
    """as the engine told, else UNKNOWN"""
    output_tokens: int
    """told or counted, else UNKNOWN"""
    model: int
    """position in Snapshot.models"""
    is_streamed: bool
    status: int
    hashes: bytes
    """the prompt's chain, 8 bytes each"""


class RecordingLog:
    """The write side of one shard."""

    def __init__(self, segment: Segment, shard: int) -> None:
        self._words = segment.words
        self._cells = segment.cells
        self._memory = segment.bytes
        self._first = first = segment.layout.recording_ring(shard)
        self._base = (first + _WORDS_BEFORE) * at.WORD
        left = self._cells[first + _BEGUN] - self._cells[first + _ENDED]
        if left:  # taken up by a predecessor that was killed
            self._words.add(first + _LOST, left)
            self._words.add(first + _ENDED, left)

    def begin(self, chain: HashChain, arrived_s: float) -> Taken | None:
        """At the pick; None when the request came too late for the recording. Each one taken up must be ended."""
        if arrived_s * 1e3 >= self._cells[at.H_RECORDING]:
            return None
        self._words.add(self._first + _BEGUN, 1)
        return Taken(round(arrived_s * 1e6), chain.total_chars, array("Q", chain.hash_list()).tobytes())

    def end(
        self,
        taken: Taken,
        *,
        prompt_tokens: int | None,
        output_tokens: int | None,
        model: int,
        is_streamed: bool,
        status: int,
    ) -> None:
        hashes = taken.hashes
        head = (
            _HEAD.size + len(hashes),
            taken.arrived_us,
            taken.total_chars,
            UNKNOWN if prompt_tokens is None else prompt_tokens,
            UNKNOWN if output_tokens is None else output_tokens,
            model,
            is_streamed,
            status,
        )
        if not self._append(head, hashes):
            self._words.add(self._first + _LOST, 1)
        self._words.add(self._first + _ENDED, 1)

    def _append(self, head: tuple[int, ...], hashes: bytes) -> bool:
        words, first, size = self._words, self._first, head[0]
        start = self._cells[first + _WRITTEN]
        offset = start % RING_BYTES
        skipped = RING_BYTES - offset if offset + size > RING_BYTES else 0
        end = start + skipped + size
        if size > MAX_RECORD_BYTES or end - words.get(first + _READ) > RING_BYTES:
            return False
        if skipped:
            self._cells[first + _WORDS_BEFORE + offset // at.WORD] = 0
            offset = 0
        place = self._base + offset
        _HEAD.pack_into(self._memory, place, *head)
        self._memory[place + _HEAD.size : place + size] = hashes
        words.put(first + _WRITTEN, end)
        return True


class RecordingReader:
    """Control's side of one shard's ring; begins with what is written from now on."""

    def __init__(self, segment: Segment, shard: int) -> None:
        self._words = segment.words
        self._memory = segment.bytes
        self._first = first = segment.layout.recording_ring(shard)
        self._base = (first + _WORDS_BEFORE) * at.WORD
        self._lost_before = self._words.get(first + _LOST)
        self._unreadable = 0
        self._words.put(first + _READ, self._words.get(first + _WRITTEN))

    @property
    def lost(self) -> int:
        return self._words.get(self._first + _LOST) - self._lost_before + self._unreadable

    @property
    def running(self) -> int:
        """Requests that were taken up and have not ended."""
        ended = self._words.get(self._first + _ENDED)  # first: it never exceeds what has begun later
        return self._words.get(self._first + _BEGUN) - ended

    def take(self) -> list[RecordedRequest]:
        """What came since the last time, and room for more."""
        written = self._words.get(self._first + _WRITTEN)
        position = self._words.get(self._first + _READ)
        found: list[RecordedRequest] = []
        while position < written:
            offset = position % RING_BYTES
            (size,) = struct.unpack_from("=q", self._memory, self._base + offset)
            if size == 0:
                position += RING_BYTES - offset
            elif _is_plausible(size, offset, written - position):
                found.append(self._record(offset, size))
                position += size
            else:
                self._unreadable += 1
                break
        self._words.put(self._first + _READ, written)
        return found

    def _record(self, offset: int, size: int) -> RecordedRequest:
        place = self._base + offset
        _, arrived_us, chars, prompt, output, model, is_streamed, status = _HEAD.unpack_from(self._memory, place)
        hashes = bytes(self._memory[place + _HEAD.size : place + size])
        return RecordedRequest(arrived_us, chars, prompt, output, model, bool(is_streamed), status, hashes)


def _is_plausible(size: int, offset: int, left: int) -> bool:
    return size % at.WORD == 0 and _HEAD.size <= size <= min(MAX_RECORD_BYTES, left, RING_BYTES - offset)
