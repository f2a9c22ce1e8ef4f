"""The fleet of one generation as policies see it (routing.views.FleetView), over the state that all shards share.

Everything is read at the moment that it is asked for, so it must be asked for with the routing mutex held; only
explanations, which book nothing, read without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from math import exp2

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.routing.fleet import SIGNAL_STALE_S, USER_HALF_LIFE_S, Signals, Worker
from pointsman.daemon.shm.bookings import Bookings
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.routing_state import RoutingState


class SharedChain:
    """A prompt's hash chain as policies see it; depths are characters."""

    __slots__ = ("chain", "head", "total_chars")

    def __init__(self, chain: HashChain) -> None:
        self.chain = chain
        self.total_chars = chain.total_chars
        self.head = chain.head

    def chars(self, depth: int) -> int:
        return depth

    def share(self, depth: int) -> float:
        return depth / self.total_chars if self.total_chars else 0.0


class _Mean:
    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class SharedLoad:
    """One worker slot."""

    __slots__ = ("_bookings", "_slot", "_state")

    def __init__(self, state: RoutingState, slot: int) -> None:
        self._state = state
        self._bookings = state.bookings
        self._slot = slot

    @property
    def in_flight(self) -> int:
        """Also those that could not be booked."""
        return max(self._state.segment.inflight(self._slot), 0)

    @property
    def decoding(self) -> int:
        return self._bookings.decoding(self._slot)

    @property
    def queued_tokens(self) -> int:
        return self._bookings.queued_tokens(self._slot)

    @property
    def tokens(self) -> int:
        return self._bookings.tokens(self._slot)

    @property
    def reserved_chars(self) -> int:
        return self._bookings.reserved(self._slot)

    @property
    def tpot(self) -> _Mean:
        return _Mean(self._bookings.tpot_s(self._slot))

    def wait_s(self, now: float) -> float:
        return self._bookings.wait_s(self._slot, now)

    def served(self, now: float) -> float:
        return self._bookings.served(self._slot, now)

    def busy(self, now: float) -> float:
        return self._bookings.busy(self._slot, now)

    def fresh_signals(self, now: float) -> Signals | None:
        told = self._state.segment.signals(self._slot)
        if told is None or now - told.at_s > SIGNAL_STALE_S:
            return None
        return Signals(
            told.at_s,
            None if told.running is None else int(told.running),
            None if told.waiting is None else int(told.waiting),
            told.kv_usage,
            told.cpu_kv_usage,
            told.busy,
            told.utilization,
        )


class _Capacities(Sequence[int | None]):
    """KV capacity in characters by position, None = not known."""

    def __init__(self, bookings: Bookings, slots: Sequence[int]) -> None:
        self._bookings = bookings
        self._slots = slots

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, worker: int) -> int | None:  # type: ignore[override]  # nobody slices it
        return self._bookings.kv_chars(self._slots[worker]) or None

    def __iter__(self) -> Iterator[int | None]:
        return (self[worker] for worker in range(len(self._slots)))


class _Index:
    def __init__(self, state: RoutingState, slots: Sequence[int]) -> None:
        self._index = state.index
        self._slots = slots

    def pinned(self, worker: int) -> int:
        return self._index.pinned(self._slots[worker])

    def size(self, worker: int) -> int:
        return self._index.size(self._slots[worker])

    def smallest(self, workers: Iterable[int]) -> int:
        return min(workers, key=self.size)


class SharedFleet:
    def __init__(self, state: RoutingState, specs: Sequence[WorkerSpec]) -> None:
        self._state = state
        self.slots = tuple(spec.slot for spec in specs)
        self.position_of = {slot: position for position, slot in enumerate(self.slots)}
        self.workers = tuple(_worker(spec) for spec in specs)
        self.loads = tuple(SharedLoad(state, slot) for slot in self.slots)
        self.kv_chars = _Capacities(state.bookings, self.slots)
        self.index = _Index(state, self.slots)
        self.cost = state.bookings
        self._key = state.key

    @property
    def output_mean(self) -> _Mean:
        return _Mean(self._state.bookings.output_mean)

    @property
    def stay(self) -> _Mean:
        return _Mean(self._state.bookings.stay_s)

    @property
    def lost(self) -> float:
        return self._state.bookings.lost

    def depths(self) -> list[int]:
        """Matched characters by position after `index.match(chain, state.matched)`; the ghost's at the end."""
        matched = self._state.matched
        return [*(matched[slot] for slot in self.slots), matched[self._state.ghost]]

    def ripen(self, workers: Iterable[int], now: float) -> None:
        for worker in workers:
            self._state.bookings.ripen(self.slots[worker], now)

    # --- users and sessions

    def user_usage(self, user: str, now: float) -> tuple[float, float, float]:
        held = self._state.users.get(self._hash(user))
        own = held[1] * exp2(-max(now - held[2], 0.0) / USER_HALF_LIFE_S) if held else 0.0
        return (own, *self._state.users.range(now, USER_HALF_LIFE_S))

    def charge_user(self, user_key: int, tokens: float, now: float) -> None:
        users = self._state.users
        held = users.get(user_key)
        own = held[1] * exp2(-max(now - held[2], 0.0) / USER_HALF_LIFE_S) if held else 0.0
        users.put(user_key, 0, max(own + tokens, 0.0), now)

    def session(self, key: str) -> tuple[int, float] | None:
        held = self._state.sessions.get(self._hash(key))
        if held is None or held[0] not in self.position_of:
            return None
        return self.position_of[held[0]], held[2]

    def stick(self, key: str, worker: int, now: float) -> None:
        self._state.sessions.put(self._hash(key), self.slots[worker], 0.0, now)

    def user_key(self, user: str) -> int:
        return self._hash(user)

    def _hash(self, text: str) -> int:
        """Never 0; keyed, so that nobody can choose keys that push others out."""
        return int.from_bytes(blake2b(text.encode(), digest_size=8, key=self._key).digest(), "little") or 1


def _worker(spec: WorkerSpec) -> Worker:
    return Worker(
        spec.url,
        spec.kv_tokens,
        spec.weight,
        spec.labels,
        spec.prompt_tokens_min,
        spec.prompt_tokens_max,
    )
