"""Numbers of transfers (`bootstrap_room`), none of which comes twice in the life of a daemon.

SGLang's two engines meet by this number alone, and an engine remembers numbers that failed: a room that is used again
fails again, or meets the transfer of another request. Randomness alone would make that rare, not impossible.

A room is a bijection of (shard, how many rooms that shard has taken): multiplication by an odd number modulo 2^63,
moved by a random key of the daemon. The counter is a word of shared memory that outlives its shard. Engines spread
rooms over their data parallel ranks by `room % ranks`; a run of rooms of one shard walks through all residues of a
power of two.
"""

from __future__ import annotations

ROOM_BITS = 63
SHARD_BITS = 8
COUNT_BITS = ROOM_BITS - SHARD_BITS
_MASK = (1 << ROOM_BITS) - 1
_ODD = 0x1E3779B97F4A7C15


class Rooms:
    """One shard's. `key`: random, the same for all shards of a daemon."""

    def __init__(self, key: int, shard: int) -> None:
        if not 0 <= shard < 1 << SHARD_BITS:
            raise ValueError(f"no shard {shard}")
        self._key = key
        self._first = shard << COUNT_BITS

    def rooms(self, taken: int, count: int) -> list[int]:
        """The next `count` rooms after this shard has taken `taken` of them."""
        if taken < 0 or taken + count > 1 << COUNT_BITS:
            raise ValueError("a shard has no more rooms than that")
        first = self._first + taken
        return [(self._key + (first + i) * _ODD) & _MASK for i in range(count)]
