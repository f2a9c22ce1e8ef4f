"""The two faces of a store: `BlobStore` for whoever keeps values in it, `Backend` for whoever implements one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from pointsman.daemon.stores.cancellation import Cancellation
from pointsman.daemon.stores.codes import CodeTable
from pointsman.daemon.stores.counters import Totals
from pointsman.daemon.stores.framing import Buffer, Frame, Storable, Value
from pointsman.daemon.stores.results import Failure, Ok, Stat, Written


class Operation(Enum):
    PUT = "put"
    GET = "get"
    DELETE = "delete"
    STAT = "stat"


class BlobStore(Protocol):
    """Values under keys. Every call returns one result per key, in the order of the keys, and raises for none of them.

    Keys are 1 to MAX_KEY_BYTES bytes of UTF-8. A key twice in one `put_many` is Invalid("duplicate_key") the second
    time. `timeout_s` bounds the whole call (default: the store's). A cancelled call ends after the batches under way.
    Either way a key keeps the last result it got; one that was never tried is Transient("deadline") or ("cancelled").
    All methods block and may be called from several threads.
    """

    def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Storable],
        *,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> list[Ok[Written] | Failure]:
        """Writes or overwrites. `ttl_s`: may be dropped after so many seconds; backends without expiry ignore it."""
        ...

    def get_many(
        self, keys: Sequence[str], *, timeout_s: float | None = None, cancellation: Cancellation | None = None
    ) -> list[Ok[Value] | Failure]: ...

    def delete_many(
        self, keys: Sequence[str], *, timeout_s: float | None = None, cancellation: Cancellation | None = None
    ) -> list[Ok[None] | Failure]: ...

    def stat_many(
        self, keys: Sequence[str], *, timeout_s: float | None = None, cancellation: Cancellation | None = None
    ) -> list[Ok[Stat] | Failure]: ...

    def tidy(self) -> None:
        """Housekeeping, for every minute or so: removes what has expired, gives unused space back."""
        ...

    def totals(self) -> Totals:
        """What was asked, retried, recovered and given up since the store was opened."""
        ...

    def close(self) -> None:
        """Idempotent; calls under way end as Transient or are finished first."""
        ...


class Backend(Protocol):
    """One attempt at one batch: no retries, one result per key in the order of the keys.

    A failure of a key is a result, also when the whole batch has it; an exception is a defect of the backend.
    `timeout_s` is what the caller still has: a call may end a little later, never much. Buffers are used during the
    call only.
    """

    name: str
    codes: CodeTable
    threads: int
    """calls that are worth making at the same time"""
    max_value_bytes: int
    """of a frame"""
    is_volatile: bool
    """a restart of the store loses all values"""

    def put_batch(
        self, keys: Sequence[str], frames: Sequence[Frame], ttl_s: float | None, timeout_s: float
    ) -> list[Ok[Written] | Failure]: ...

    def get_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Buffer] | Failure]:
        """The frames as they lie there, unchecked. The buffers belong to the caller."""
        ...

    def delete_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[None] | Failure]: ...

    def stat_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Stat] | Failure]: ...

    def tidy(self) -> None:
        """As `BlobStore.tidy`; what is in its way now may be gone the next time."""
        ...

    def close(self) -> None: ...
