"""Where everything lies in the prefix index' segment, and how large its pools are: pure arithmetic.

    header          two pages: identity, mutex, free lists, counters; the undo journal
    slot rows       128 bytes per worker slot: characters, blocks, pinned characters, capacity, order of use
    table           of the blocks, by hash: 8 bytes for at most every second entry
    bucket heads    of the holdings, by block and slot: 4 bytes each
    blocks          64 bytes each: hash, mask of 256 slots, characters, parent
    holdings        40 bytes each: one worker holds one block
    pins            16 bytes each: one request in flight

The formats of the records are structs in prefix_core.h; `prefix.pyx` cannot be imported when the sizes below are not
theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAGIC = 0x3158444950535450  # "PTSPIDX1", little endian
VERSION = 1
MIB = 1 << 20
PAGE = 4096

HEADER_BYTES = 2 * PAGE
SLOT_BYTES = 128
BLOCK_BYTES = 64
HOLDING_BYTES = 40
PIN_BYTES = 16
ENTRY_BYTES = 8
HEAD_BYTES = 4

MAX_SLOTS = 256
MIN_BLOCK_CHARS, MAX_BLOCK_CHARS = 16, 1 << 20
HOLDINGS_PER_BLOCK = 2
"""Pool sizes: what is shared by many workers has many holdings, most blocks have one."""
BLOCKS_PER_PIN = 16
MIN_PINS, MAX_PINS = 1024, 1 << 16
MIN_BLOCKS = 64


def _power_above(count: int) -> int:
    return 1 << max(count - 1, 1).bit_length()


def _aligned(offset: int) -> int:
    return -(-offset // 64) * 64


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """Offsets in bytes for `slots` worker slots and pools of `blocks` blocks, `holdings` holdings, `pins` pins."""

    slots: int
    blocks: int
    holdings: int
    pins: int
    table_size: int = field(init=False)
    holding_buckets: int = field(init=False)
    off_slots: int = field(init=False)
    off_table: int = field(init=False)
    off_holding_heads: int = field(init=False)
    off_blocks: int = field(init=False)
    off_holdings: int = field(init=False)
    off_pins: int = field(init=False)
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"a prefix index has 1 to {MAX_SLOTS} worker slots, not {self.slots}")
        put = object.__setattr__
        put(self, "table_size", _power_above(2 * self.blocks))
        put(self, "holding_buckets", _power_above(self.holdings))
        offset = HEADER_BYTES
        for name, size in (
            ("off_slots", self.slots * SLOT_BYTES),
            ("off_table", self.table_size * ENTRY_BYTES),
            ("off_holding_heads", self.holding_buckets * HEAD_BYTES),
            ("off_blocks", self.blocks * BLOCK_BYTES),
            ("off_holdings", self.holdings * HOLDING_BYTES),
            ("off_pins", self.pins * PIN_BYTES),
        ):
            put(self, name, offset)
            offset = _aligned(offset + size)
        put(self, "size_bytes", -(-offset // PAGE) * PAGE)

    @classmethod
    def fitting(cls, size_bytes: int, slots: int) -> PrefixLayout:
        """The largest index of at most `size_bytes`. Raises ValueError when that is too small for any."""
        low, high = 0, size_bytes // BLOCK_BYTES
        while low < high:
            middle = (low + high + 1) // 2
            if cls._of(middle, slots).size_bytes <= size_bytes:
                low = middle
            else:
                high = middle - 1
        if low < MIN_BLOCKS:
            raise ValueError(f"{size_bytes} bytes are too few for a prefix index of {slots} worker slots")
        return cls._of(low, slots)

    @classmethod
    def _of(cls, blocks: int, slots: int) -> PrefixLayout:
        pins = min(max(blocks // BLOCKS_PER_PIN, MIN_PINS), MAX_PINS)
        return cls(slots, blocks, blocks * HOLDINGS_PER_BLOCK, pins)
