"""The last routed requests of every shard: what was decided, what was predicted, what came true.

One ring per shard in the segment, one writer (the shard: `choosing.Chooser.note`), readers without a lock. A record is
sixteen words; the first is its sequence number, 0 while it is being written, so a reader that sees the same number
before and after has a whole record. No text: request ids, prompts and workers are there as hashes and numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.native import key_of_bytes
from pointsman.daemon.shm.segment import Segment

_RECORD = struct.Struct("=7qQ7q")
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
    return key_of_bytes(text.encode() if isinstance(text, str) else text)


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
