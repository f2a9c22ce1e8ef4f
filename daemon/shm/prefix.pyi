from collections.abc import Buffer, Iterable, Sequence  # type: ignore[attr-defined]

from pointsman.daemon.shm.prefix_layout import PrefixLayout

class HashChain:
    """A prompt as the index sees it; filled again and again. `len()` is its number of blocks."""

    block_chars: int
    total_chars: int
    def __init__(self, seed: int, block_bytes: int) -> None: ...
    def __len__(self) -> int: ...
    def load(self, text: Buffer, salt: bytes | str = b"") -> HashChain:
        """`text`: bytes-like. `salt` (model, LoRA) keeps equal texts apart. Returns self."""

    def load_spans(self, spans: Iterable[Buffer], salt: bytes | str = b"") -> HashChain:
        """Like `load` of the concatenation, without making it. Returns self."""

    def load_ids(
        self, ids: Sequence[int] | Buffer, block_chars: int, total_chars: int, salt: bytes | str = b""
    ) -> HashChain:
        """64-bit block ids, each for `block_chars` characters, the last for the rest of `total_chars`.

        Raises ValueError when there are fewer ids than `total_chars` needs, or for a `block_chars` outside 1 … 2^32 - 1.
        """

    def hash_list(self) -> list[int]: ...

class RawIndex:
    """Raises ValueError when the buffer is no index, IndexError for a slot or shard that does not exist."""

    def __init__(
        self, buffer: Buffer, layout: PrefixLayout | None = None, seed: int = 0, block_bytes: int = 512
    ) -> None: ...
    def lock(self, deadline_us: int = 2000) -> bool:
        """Take the mutex for several calls; False when `deadline_us` passed. RuntimeError when held already."""

    def unlock(self) -> None: ...
    def chain(self) -> HashChain:
        """An empty chain with this index' seed and block size."""

    def match(self, chain: HashChain, out: Buffer) -> int:
        """Fills `out` (writable, 8 bytes per slot, native unsigned) with the characters that every worker holds.

        Renews nothing. Returns the largest, -1 when the lock was not got (`out` is as it was).
        """

    def insert(self, slot: int, chain: HashChain) -> int:
        """The worker holds `chain`, used just now; evicts what no longer fits. Never ends above the capacity.

        Returns the characters of it that are held now (the head, when not all fits), -1 when the lock was not got.
        """

    def match_and_insert(self, chain: HashChain, slot: int, out: Buffer) -> int:
        """`match`, then `insert`, in one hold of the lock; returns what `match` does."""

    def pin(self, slot: int, chain: HashChain, shard: int = 0, may_exceed: bool = False) -> int:
        """`insert`, and nothing of it is evicted until `unpin(token)`. Returns the token.

        0: nothing was pinned (an empty prompt, no room, no pin record left, no lock). With `may_exceed` blocks of
        requests in flight may take a worker above its capacity, as an engine's queue does; else what does not fit is left out.
        """

    def unpin(self, token: int) -> bool | None:
        """Renews the blocks and lets them go. False for a void token; None when it is put off for want of the lock."""

    def size(self, slot: int) -> int:
        """Characters held. Like the next ones a single word, read without the lock."""

    def blocks(self, slot: int) -> int: ...
    def pinned(self, slot: int) -> int:
        """Characters that requests in flight hold, shared blocks once."""

    def capacity(self, slot: int) -> int:
        """Characters, 0 = unlimited."""

    def is_forgetting(self, slot: int) -> bool: ...
    def put_capacity(self, slot: int, chars: int) -> None: ...
    def sizes(self, out: Buffer) -> None:
        """`size` of every slot, into a writable buffer of 8 bytes per slot."""

    def smallest(self, slots: Iterable[int]) -> int: ...
    def shrink(self, slot: int, to_chars: int, budget_us: int, most: int = -1) -> tuple[int, bool]: ...
    def make_room(self, blocks: int, holdings: int, budget_us: int) -> tuple[int, bool]: ...
    def forget_begin(self, slot: int) -> bool: ...
    def forget_more(self, slot: int, budget_us: int) -> bool: ...
    def reclaim_shard(self, shard: int) -> int:
        """Gives back a dead shard's pins; returns how many, -1 when the lock was not got for all of it (call again)."""

    def dump_records(self) -> bytearray: ...
    def load_records(self, records: Buffer, slot_of: Sequence[int]) -> int: ...
    def check(self) -> list[str]:
        """Recounts everything: the violations found. Holds the lock all the while; TimeoutError when it is not to be had."""

    def totals(self) -> dict[str, int]: ...
    def held_blocks(self, slot: int) -> set[int]: ...

def abort_at(step: int) -> None:
    """Kill tests: SIGKILL for this process at its `step`-th journalled store or commit from now on; 0 = never."""
