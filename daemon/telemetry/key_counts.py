"""What every API key has asked for: answers and tokens, in shared memory. How shards write it, how it is read back.

A row per shard and key, at the key's index in `Snapshot.key_names`; only its shard writes it, nothing resets it. This
module is on the request path: it imports nothing heavy.
"""

from __future__ import annotations

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment


class KeyCounts:
    """The write side: one per shard process."""

    __slots__ = ("_cells", "_rows")

    def __init__(self, segment: Segment, shard: int) -> None:
        self._cells = segment.cells
        self._rows = segment.layout.key_row(shard, 0)

    def count(self, label: int, status: int, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """One more request under the key was answered with that status."""
        cells = self._cells
        row = self._rows + label * at.KEY_WORDS
        cells[row + (at.K_GOOD if status < 400 else at.K_CLIENT_ERRORS if status < 500 else at.K_SERVER_ERRORS)] += 1
        cells[row + at.K_PROMPT_TOKENS] += prompt_tokens
        cells[row + at.K_OUTPUT_TOKENS] += output_tokens


def read_key_counts(segment: Segment, label: int) -> tuple[int, ...]:
    """The words K_*, added up over the shards."""
    rows = [segment.layout.key_row(shard, label) for shard in range(segment.layout.shards)]
    return tuple(sum(segment.cells[row + word] for row in rows) for word in range(at.K_OUTPUT_TOKENS + 1))
