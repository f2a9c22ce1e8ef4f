"""The last routed requests of every shard: what was decided, what was predicted, what came true.

One ring per shard in the segment, one writer (the shard), readers without a lock. A record is sixteen words; the first
is its sequence number, 0 while it is being written, so a reader that sees the same number before and after has a whole
record. No text: request ids, prompts and workers are there as hashes and numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

_RECORD = struct.Struct("=7qQQ6q")
"""all of a record but its first word"""
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """Times in microseconds, sizes in tokens; UNKNOWN where nobody told."""

    ended_us: int
    """Unix time of the end"""
    slot: int
    worker_key: int
    """`key_of` the worker's id: a slot may have another tenant by now"""
    reason: int
    """position in routing.picking.REASONS; UNKNOWN: taken without the routing state"""
    prompt_tokens: int
    believed_tokens: int
    """of the prompt, believed to be cached at the pick"""
    predicted_us: int
    """to the first byte"""
    group: int
    """hash of the prompt's head; 0 = no prompt"""
    request_key: int
    """`key_of` the request id"""
    first_byte_us: int
    """since the request came, UNKNOWN when the answer was not streamed or did not come"""
    total_us: int
    output_tokens: int
    engine_prompt_tokens: int
    engine_cached_tokens: int
    status: int


def key_of(text: str | bytes) -> int:
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1


class DecisionLog:
    """The write side of one shard."""

    def __init__(self, segment: Segment, shard: int) -> None:
        self._cells = segment.cells
        self._memory = segment.bytes
        self._head = segment.layout.decision_ring(shard)

    def note(
        self,
        ended_us: int,
        slot: int,
        worker_key: int,
        reason: int,
        prompt_tokens: int,
        believed_tokens: int,
        predicted_us: int,
        group: int,
        request_key: int,
        first_byte_us: int,
        total_us: int,
        output_tokens: int,
        engine_prompt_tokens: int,
        engine_cached_tokens: int,
        status: int,
    ) -> None:
        """The fields of a DecisionRecord, in order."""
        cells, head = self._cells, self._head
        number = cells[head] + 1
        first = head + 8 + (number % at.DECISIONS) * at.DECISION_WORDS
        cells[first] = 0
        _RECORD.pack_into(
            self._memory, (first + 1) * at.WORD, ended_us, slot, worker_key, reason, prompt_tokens, believed_tokens,
            predicted_us, group, request_key, first_byte_us, total_us, output_tokens, engine_prompt_tokens,
            engine_cached_tokens, status,
        )  # fmt: skip
        cells[first] = number
        cells[head] = number


def read_decisions(segment: Segment, shard: int) -> Iterator[DecisionRecord]:
    """From the newest to the oldest that the ring still holds."""
    cells = segment.cells
    head = segment.layout.decision_ring(shard)
    newest = cells[head]
    for number in range(newest, max(newest - at.DECISIONS, 0), -1):
        first = head + 8 + (number % at.DECISIONS) * at.DECISION_WORDS
        if cells[first] != number:
            continue
        values = _RECORD.unpack_from(segment.bytes, (first + 1) * at.WORD)
        if cells[first] == number:
            yield DecisionRecord(*values)
