"""The requests of one shard that wait for admission; local to the shard, in order of their rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import Enum


class WaiterState(Enum):
    NEW = "new"
    WAITING = "waiting"
    ADMITTED = "admitted"
    """Holds a permit."""
    REFUSED = "refused"
    """The queue was full when it came."""
    DISPLACED = "displaced"
    """It had waited, then the queue was full and a better ranked request came."""
    EXPIRED = "expired"
    """It waited for `queue_timeout_s`."""
    DONE = "done"
    """It gave its permit or its place back."""


class Waiter:
    """One request on its way through admission. `context` is the caller's."""

    __slots__ = ("context", "deadline", "estimate", "priority", "rank", "serial", "since", "state", "user")

    def __init__(self, user: int = 0, priority: int = 2, estimate: float = 0.0, context: object = None) -> None:
        self.user = user
        """64-bit hash; 0 = the request does not tell."""
        self.priority = priority
        """Index in `settings.PRIORITIES`."""
        self.estimate = estimate
        """Tokens of prompt and answer."""
        self.context = context
        self.state = WaiterState.NEW
        self.since = 0.0
        self.deadline = 0.0
        self.rank = 0.0
        """Lower goes first; set once, on arrival."""
        self.serial = 0

    @property
    def is_admitted(self) -> bool:
        return self.state is WaiterState.ADMITTED


class Line:
    """Waiters of the shard `shard`. Sorted lists: a few microseconds at 10,000 waiters, and nothing to clean up."""

    __slots__ = ("_by_deadline", "_serial", "by_rank", "shard")

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.by_rank: list[tuple[float, int, Waiter]] = []
        """the same list for ever: who asks for every request whether anybody waits keeps it"""
        self._by_deadline: list[tuple[float, int, Waiter]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self.by_rank)

    @property
    def best(self) -> Waiter | None:
        return self.by_rank[0][2] if self.by_rank else None

    @property
    def worst(self) -> Waiter:
        """Raises IndexError when nobody waits."""
        return self.by_rank[-1][2]

    @property
    def next_deadline(self) -> float | None:
        return self._by_deadline[0][0] if self._by_deadline else None

    def add(self, waiter: Waiter) -> None:
        self._serial = waiter.serial = self._serial + 1
        waiter.state = WaiterState.WAITING
        insort(self.by_rank, (waiter.rank, waiter.serial, waiter))
        insort(self._by_deadline, (waiter.deadline, waiter.serial, waiter))

    def remove(self, waiter: Waiter, state: WaiterState) -> None:
        """The waiter must be in the line; it leaves it in the given state."""
        # A shorter tuple sorts before the longer one that begins with it.
        del self.by_rank[bisect_left(self.by_rank, (waiter.rank, waiter.serial))]
        del self._by_deadline[bisect_left(self._by_deadline, (waiter.deadline, waiter.serial))]
        waiter.state = state

    def postpone(self, seconds: float) -> None:
        """Everybody may wait that much longer."""
        for _, _, waiter in self._by_deadline:
            waiter.deadline += seconds
        self._by_deadline = [(waiter.deadline, serial, waiter) for _, serial, waiter in self._by_deadline]

    def expired(self, now: float) -> Waiter | None:
        """Who has waited longest of those whose time is over."""
        if self._by_deadline and self._by_deadline[0][0] <= now:
            return self._by_deadline[0][2]
        return None
