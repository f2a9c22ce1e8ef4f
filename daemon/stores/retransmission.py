"""The one engine over all backends: what failed and may work later is sent again, and nothing else.

A call goes in rounds. The first sends every key in batches, side by side where the backend gains from it; each later
round waits, gathers the keys that failed and may be sent again into new batches, and sends those. Every key has its
slot in the list of results from the start and only its own slot ever changes. A frame is made once and every attempt
sends the same memory. Writes overwrite, so one that took place and whose answer was lost is harmlessly repeated.

Clock, sleep and randomness come from outside: tests run hours of backoff in no time.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar, cast

import msgspec

from pointsman.daemon.stores.blob_store import Backend, Operation
from pointsman.daemon.stores.cancellation import Cancellation, linked
from pointsman.daemon.stores.codes import CodeTable
from pointsman.daemon.stores.counters import Counters, Totals
from pointsman.daemon.stores.framing import Buffer, Frame, Storable, UnstorableError, Value, decode, encode
from pointsman.daemon.stores.results import (
    Code,
    Failure,
    Invalid,
    NoSpace,
    Ok,
    Stat,
    Transient,
    Written,
    code_of,
    name_some,
)
from pointsman.daemon.telemetry.logs import log

T = TypeVar("T")
Attempt = Callable[[Sequence[int], float], Sequence[Ok[T] | Failure]]
"""Sends the keys at these places once, in at most so many seconds; a result for each, in this order."""

MAX_KEY_BYTES = 1024
SizeOf = Callable[[int], int | None]
"""of the frame at a place, in bytes; None: there is nothing to send there"""


class Policy(msgspec.Struct, frozen=True):
    retries: int = 3
    base_s: float = 1.0
    """the first pause; every further one is twice as long"""
    max_pause_s: float = 8.0
    jitter: float = 0.5
    """a pause is drawn from [1 - jitter, 1] times its length, so that many clients do not come back at once"""
    no_space_factor: float = 2.0
    """a full store takes longer to change than a connection"""
    batch_keys: int = 400
    batch_bytes: int = 32 * 1024 * 1024
    """of frames; a larger value travels alone"""
    threads: int = 4
    timeout_s: float = 30.0
    """of a whole call with all its pauses, unless the caller says otherwise"""

    def pause_s(self, retry: int, drawn: float, *, is_full: bool) -> float:
        """Before the `retry`-th retry (from 1); `drawn` is uniform in [0, 1)."""
        length_s = min(self.max_pause_s, self.base_s * 2.0 ** (retry - 1))
        return length_s * (self.no_space_factor if is_full else 1.0) * (1.0 - self.jitter * drawn)


MOONCAKE_POLICY = Policy(retries=5, timeout_s=45.0)
"""Mooncake's master sends readers and writers to a dead holder until its client_ttl (10 s) has passed, also where
another holder has a copy: the pauses must add up to more than that in every draw."""


class Clock(Protocol):
    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    def sleep(self, seconds: float, cancellation: Cancellation) -> None:
        """Returns early when cancelled."""
        ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, cancellation: Cancellation) -> None:
        cancellation.wait(seconds)


class RetransmittingStore:
    """A `BlobStore` over any `Backend`, which it owns."""

    def __init__(
        self,
        backend: Backend,
        policy: Policy | None = None,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.backend = backend
        self.policy = policy or Policy()
        self.counters = Counters()
        self._clock = clock or MonotonicClock()
        self._rng = rng or random.Random()
        self._lock = threading.Condition()
        self._calls = 0
        self._closing = Cancellation()
        self._pool: ThreadPoolExecutor | None = None

    def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Storable],
        *,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> list[Ok[Written] | Failure]:
        """As `BlobStore.put_many`. Raises ValueError when there are not as many values as keys."""
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys, but {len(values)} values")
        call: _Call[Written] = _Call(Operation.PUT, keys, self._deadline(timeout_s))
        _refuse_duplicates(call)
        frames = _Frames(call, values, self.backend.max_value_bytes)

        def attempt(places: Sequence[int], left_s: float) -> Sequence[Ok[Written] | Failure]:
            batch = [frames[place] for place in places]
            return self.backend.put_batch([keys[place] for place in places], batch, ttl_s, left_s)

        return self._run(call, attempt, cancellation, frames.size)

    def get_many(
        self, keys: Sequence[str], *, timeout_s: float | None = None, cancellation: Cancellation | None = None
    ) -> list[Ok[Value] | Failure]:
        def attempt(places: Sequence[int], left_s: float) -> Sequence[Ok[Value] | Failure]:
            batch = [keys[place] for place in places]
            frames = self.backend.get_batch(batch, left_s)
            if len(frames) != len(batch):
                return [Transient("result_count")] * len(batch)
            return [_opened(key, frame) for key, frame in zip(batch, frames, strict=True)]

        return self._run(_Call(Operation.GET, keys, self._deadline(timeout_s)), attempt, cancellation)

    def delete_many(
        self, keys: Sequence[str], *, timeout_s: float | None = None, cancellation: Cancellation | None = None
    ) -> list[Ok[None] | Failure]:
        def attempt(places: Sequence[int], left_s: float) -> Sequence[Ok[None] | Failure]:
            return self.backend.delete_batch([keys[place] for place in places], left_s)

        return self._run(_Call(Operation.DELETE, keys, self._deadline(timeout_s)), attempt, cancellation)

    def stat_many(
        self, keys: Sequence[str], *, timeout_s: float | None = None, cancellation: Cancellation | None = None
    ) -> list[Ok[Stat] | Failure]:
        def attempt(places: Sequence[int], left_s: float) -> Sequence[Ok[Stat] | Failure]:
            return self.backend.stat_batch([keys[place] for place in places], left_s)

        return self._run(_Call(Operation.STAT, keys, self._deadline(timeout_s)), attempt, cancellation)

    def tidy(self) -> None:
        self.backend.tidy()

    def totals(self) -> Totals:
        return self.counters.totals()

    def close(self) -> None:
        """Ends the pauses of calls under way, waits for their last batches, then closes the backend."""
        self._closing.cancel()
        with self._lock:
            self._lock.wait_for(lambda: self._calls == 0)
        if self._pool:
            self._pool.shutdown()
        self.backend.close()

    def _deadline(self, timeout_s: float | None) -> float:
        return self._clock.now() + (self.policy.timeout_s if timeout_s is None else timeout_s)

    def _run(
        self,
        call: _Call[T],
        attempt: Attempt[T],
        cancellation: Cancellation | None,
        size: SizeOf | None = None,
    ) -> list[Ok[T] | Failure]:
        started = self._clock.now()
        self._enter()
        try:
            with linked(cancellation, self._closing) as token:
                self._rounds(call, attempt, token, size)
        finally:
            self._leave()
        call.settle("cancelled" if token.is_cancelled else "deadline", self.backend.codes)
        call.report(self.backend.name, self.counters, self._clock.now() - started)
        return call.finished()

    def _rounds(self, call: _Call[T], attempt: Attempt[T], token: Cancellation, size: SizeOf | None) -> None:
        pending = [place for place, result in enumerate(call.results) if result is None]
        for retry in range(self.policy.retries + 1):
            if retry and not self._pause(call, pending, retry, token):
                return
            self._send(call, attempt, token, _cut(pending, size, self.policy))
            pending = call.to_retry(self.backend.codes)
            if not pending or token.is_cancelled:
                return

    def _pause(self, call: _Call[T], pending: Sequence[int], retry: int, token: Cancellation) -> bool:
        """Whether there is time for another round after it."""
        is_full = any(isinstance(call.results[place], NoSpace) for place in pending)
        pause_s = self.policy.pause_s(retry, self._rng.random(), is_full=is_full)
        if self._clock.now() + pause_s >= call.deadline:
            return False
        self._clock.sleep(pause_s, token)
        return not token.is_cancelled

    def _send(self, call: _Call[T], attempt: Attempt[T], token: Cancellation, batches: Iterator[Sequence[int]]) -> None:
        """The next batch is put together while the ones before are under way."""

        def send(batch: Sequence[int]) -> None:
            left_s = call.deadline - self._clock.now()
            if left_s > 0 and not token.is_cancelled:
                call.take(batch, attempt(batch, left_s))

        first_two = list(islice(batches, 2))
        if len(first_two) < 2 or self._threads == 1:
            for batch in chain(first_two, batches):
                send(batch)
            return
        sent: list[Future[None]] = []
        try:
            sent.extend(self._workers().submit(send, batch) for batch in chain(first_two, batches))
            ended, _ = wait(sent, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
        except BaseException:  # a defect of the backend; nobody may still use the caller's buffers when it is raised
            token.cancel()
            wait(sent)
            raise

    @property
    def _threads(self) -> int:
        return min(self.policy.threads, self.backend.threads)

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix=f"store-{self.backend.name}")
            return self._pool

    def _enter(self) -> None:
        with self._lock:
            self._calls += 1

    def _leave(self) -> None:
        with self._lock:
            self._calls -= 1
            self._lock.notify_all()


class _Call(Generic[T]):
    """The slots of one call, and what is to be told about it."""

    def __init__(self, operation: Operation, keys: Sequence[str], deadline: float) -> None:
        self.operation = operation
        self.keys = keys
        self.deadline = deadline
        self.results: list[Ok[T] | Failure | None] = [_key_problem(key) for key in keys]
        self._lock = threading.Lock()
        self._retried = 0
        self._failed: set[int] = set()
        """places that failed at least once and were sent again, or are to be"""
        self._exhausted: list[int] = []
        self._failures: Counter[Code] = Counter()

    def take(self, places: Sequence[int], results: Sequence[Ok[T] | Failure]) -> None:
        """The outcome of one batch; another number of results than of keys tells nothing of any key."""
        if len(results) != len(places):
            results = [Transient("result_count")] * len(places)
        with self._lock:
            for place, result in zip(places, results, strict=True):
                before, self.results[place] = self.results[place], result
                if before is not None:
                    self._retried += 1
                if not isinstance(result, Ok):
                    self._failures[code_of(result)] += 1

    def to_retry(self, codes: CodeTable) -> list[int]:
        """The places of the next round: failed in a way that may pass. For those never sent there was no time left."""
        again = [
            place
            for place, result in enumerate(self.results)
            if result is not None and not isinstance(result, Ok) and codes.is_retried(result)
        ]
        self._failed.update(again)
        return again

    def settle(self, reason: str, codes: CodeTable) -> None:
        """Gives every key that was never sent its result, and finds those that another try might still have saved."""
        for place, before in enumerate(self.results):
            result = Transient(reason) if before is None else before
            if before is None:
                self.results[place] = result
                self._failures[reason] += 1
            if not isinstance(result, Ok) and codes.is_retried(result):
                self._exhausted.append(place)

    def report(self, backend: str, counters: Counters, seconds: float) -> None:
        recovered = sum(isinstance(self.results[place], Ok) for place in self._failed)
        exhausted = self._named(self._exhausted)
        counters.add(
            self.operation.value,
            keys=len(self.keys),
            retried=self._retried,
            recovered=recovered,
            exhausted=len(exhausted),
            failures=self._failures,
        )
        if self._failed or exhausted:
            log(
                "store_retransmission",
                "warning" if exhausted else "info",
                store=backend,
                operation=self.operation.value,
                keys=len(self.keys),
                retried=self._retried,
                recovered=recovered,
                exhausted=len(exhausted),
                codes={str(code): count for code, count in self._failures.items()},
                seconds=round(seconds, 3),
                failed=name_some(exhausted),
            )

    def finished(self) -> list[Ok[T] | Failure]:
        assert None not in self.results
        return cast("list[Ok[T] | Failure]", self.results)

    def _named(self, places: Iterable[int]) -> list[tuple[str, Failure]]:
        return [(self.keys[place], cast("Failure", self.results[place])) for place in places]


class _Frames:
    """Of one write: each made when its size is asked for, then kept, so that every attempt sends the same memory."""

    def __init__(self, call: _Call[Written], values: Sequence[Storable], most_bytes: int) -> None:
        self._call = call
        self._values = values
        self._most_bytes = most_bytes
        self._frames: dict[int, Frame] = {}

    def __getitem__(self, place: int) -> Frame:
        return self._frames[place]

    def size(self, place: int) -> int | None:
        """In bytes; None: the value cannot be stored, and its key has that as its result."""
        if place not in self._frames:
            try:
                frame = encode(self._call.keys[place], self._values[place])
            except UnstorableError as error:
                self._call.results[place] = Invalid(error.code)
                return None
            if frame.size_bytes > self._most_bytes:
                self._call.results[place] = Invalid("too_large")
                return None
            self._frames[place] = frame
        return self._frames[place].size_bytes


def _opened(key: str, frame: Ok[Buffer] | Failure) -> Ok[Value] | Failure:
    return decode(key, frame.value) if isinstance(frame, Ok) else frame


def _key_problem(key: str) -> Invalid | None:
    if 0 < len(key) <= MAX_KEY_BYTES and key.isascii():
        return None
    if not key:
        return Invalid("empty_key")
    try:
        return Invalid("long_key") if len(key.encode()) > MAX_KEY_BYTES else None
    except UnicodeEncodeError:
        return Invalid("key_text")


def _refuse_duplicates(call: _Call[Written]) -> None:
    """Batches run side by side: nobody could say which of two values for one key stays."""
    if len(set(call.keys)) == len(call.keys):
        return
    seen: set[str] = set()
    for place, key in enumerate(call.keys):
        if key in seen:
            call.results[place] = Invalid("duplicate_key")
        seen.add(key)


def _cut(places: Sequence[int], size: SizeOf | None, policy: Policy) -> Iterator[Sequence[int]]:
    """Batches of at most `batch_keys` and, where sizes are known, `batch_bytes`; a larger value travels alone."""
    if size is None:
        for start in range(0, len(places), policy.batch_keys):
            yield places[start : start + policy.batch_keys]
        return
    batch: list[int] = []
    total = 0
    for place in places:
        size_bytes = size(place)
        if size_bytes is None:
            continue
        if batch and (len(batch) == policy.batch_keys or total + size_bytes > policy.batch_bytes):
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += size_bytes
    if batch:
        yield batch
