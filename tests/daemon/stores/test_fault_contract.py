"""What every store makes of failures: the scripted one, SQLite, a real Redis, a real Mooncake, each behind a script.

The engine's own rules are in test_retransmission; here they meet what every backend really stores and gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pointsman.daemon.stores.cancellation import Cancellation
from pointsman.daemon.stores.framing import Storable
from pointsman.daemon.stores.open_store import open_backend
from pointsman.daemon.stores.results import (
    MISSING,
    Code,
    Corrupt,
    Invalid,
    Missing,
    NoSpace,
    Ok,
    TransferError,
    Transient,
    Written,
    require_all,
)
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from tests.daemon.stores.faults import FaultyBackend
from tests.daemon.stores.scripted import ScriptedBackend, VirtualClock
from tests.daemon.stores.servers import needs_mooncake, needs_redis


class Codes:
    """Of one backend, for the same four cases."""

    def __init__(self, transient: Code, final: Code, missing: Code | None, full: Code) -> None:
        self.transient, self.final, self.missing, self.full = transient, final, missing, full


CODES = {
    "scripted": Codes(-800, -600, -704, -200),
    "sqlite": Codes("SQLITE_BUSY", "SQLITE_READONLY", None, "SQLITE_FULL"),
    "redis": Codes("timeout", "WRONGTYPE", None, "OOM"),
    "mooncake": Codes(-800, -600, -704, -200),
}


class Bench:
    def __init__(self, name: str, backend: FaultyBackend, some: str) -> None:
        self.backend = backend
        self.codes = CODES[name]
        self.clock = VirtualClock()
        self.keys = [f"{some}{number}" for number in range(6)]
        self.store = self.with_policy(Policy())

    def with_policy(self, policy: Policy) -> RetransmittingStore:
        return RetransmittingStore(self.backend, policy, clock=self.clock)

    def script(self, place: int, *codes: Code) -> None:
        self.backend.script[self.keys[place]] = list(codes)

    def sent(self) -> list[list[int]]:
        """Places of the keys of every batch since the last call."""
        batches, self.backend.batches = self.backend.batches, []
        return [[self.keys.index(key) for key in batch] for batch in batches]


@pytest.fixture(
    params=[
        "scripted",
        "sqlite",
        pytest.param("redis", marks=needs_redis),
        pytest.param("mooncake", marks=needs_mooncake),
    ]
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    match request.param:
        case "scripted":
            backend = FaultyBackend(ScriptedBackend())
        case "sqlite":
            backend = FaultyBackend(open_backend(f"sqlite:{tmp_path}/blobs.db"))
        case "redis":
            backend = FaultyBackend(open_backend(f"{request.getfixturevalue('redis_url')}?prefix={tmp_path.name}/"))
        case _:
            backend = FaultyBackend(open_backend(f"mooncake://{request.getfixturevalue('mooncake_address')}"))
    backend.threads = 1  # the order of the batches is looked at
    yield Bench(request.param, backend, f"{tmp_path.name}/faults/")
    backend.close()


VALUES: Sequence[Storable] = [b"zero", b"", "", None, b"four" * 1000, b"five"]
WRITTEN = Ok(Written())


def test_only_the_failed_subset_is_sent_again_in_order(bench: Bench) -> None:
    transient = bench.codes.transient
    bench.script(1, transient, transient)
    bench.script(3, transient)
    bench.script(5, transient, transient, transient)
    assert bench.store.put_many(bench.keys, VALUES) == [WRITTEN] * 6
    assert bench.sent() == [[0, 1, 2, 3, 4, 5], [1, 3, 5], [1, 5], [5]]
    bench.script(2, transient)
    assert bench.store.get_many(bench.keys) == [Ok(value) for value in VALUES]
    assert bench.sent() == [[0, 1, 2, 3, 4, 5], [2]]
    assert bench.store.totals().recovered == 4
    bench.script(0, transient)
    assert bench.store.delete_many(bench.keys) == [Ok(None)] * 6
    assert bench.store.stat_many(bench.keys) == [MISSING] * 6


@pytest.mark.parametrize(
    "cut", [lambda frame: frame[:-1], lambda frame: b"", lambda frame: bytes([frame[0] ^ 1]) + frame[1:]]
)
def test_a_short_or_flipped_read_is_never_data(bench: Bench, cut: Callable[[bytes], bytes]) -> None:
    require_all("put", bench.keys, bench.store.put_many(bench.keys, VALUES))
    bench.backend.misreads[bench.keys[4]] = [cut] * 9
    results = bench.store.get_many(bench.keys)
    assert isinstance(results[4], Corrupt)
    assert [result for place, result in enumerate(results) if place != 4] == [
        Ok(value) for place, value in enumerate(VALUES) if place != 4
    ]
    bench.backend.misreads.clear()
    assert bench.store.get_many(bench.keys) == [Ok(value) for value in VALUES]


def test_mixed_final_and_transient(bench: Bench) -> None:
    codes = bench.codes
    bench.script(1, codes.final)
    bench.script(2, codes.transient, codes.final)
    bench.script(3, *[codes.transient] * 9)
    bench.script(5, codes.transient)
    results = bench.store.put_many(bench.keys, VALUES)
    assert results == [
        WRITTEN,
        Invalid(codes.final),
        Invalid(codes.final),
        Transient(codes.transient),
        WRITTEN,
        WRITTEN,
    ]
    assert bench.sent() == [[0, 1, 2, 3, 4, 5], [2, 3, 5], [3], [3]]
    bench.backend.script.clear()
    assert bench.store.get_many(bench.keys) == [Ok(b"zero"), MISSING, MISSING, MISSING, Ok(VALUES[4]), Ok(b"five")]
    with pytest.raises(TransferError) as caught:
        require_all("put", bench.keys, results)
    assert list(caught.value.failed) == bench.keys[1:4]
    assert caught.value.succeeded == [bench.keys[place] for place in (0, 4, 5)]


def test_missing_is_final_where_the_backend_has_a_code_for_it(bench: Bench) -> None:
    if bench.codes.missing is not None:
        bench.store.put_many(bench.keys[:1], VALUES[:1])
        bench.script(0, bench.codes.missing)
        assert bench.store.get_many(bench.keys[:1]) == [Missing()]
        bench.script(0, bench.codes.missing)
        assert bench.store.put_many(bench.keys[:1], VALUES[:1]) == [WRITTEN], "of a write nothing is missing"
    assert bench.store.get_many(bench.keys[1:2]) == [Missing()]
    assert bench.store.totals().exhausted == 0


def test_a_full_store_says_so_and_keeps_what_it_has(bench: Bench) -> None:
    bench.store.put_many(bench.keys[:2], VALUES[:2])
    for place in range(2, 6):
        bench.script(place, *[bench.codes.full] * 9)
    assert bench.store.put_many(bench.keys, VALUES) == [WRITTEN] * 2 + [NoSpace(bench.codes.full)] * 4
    assert bench.store.get_many(bench.keys[:2]) == [Ok(b"zero"), Ok(b"")]


@pytest.mark.parametrize("wrong", [-1, 1, -6])
def test_a_wrong_number_of_results_tells_nothing_of_any_key(bench: Bench, wrong: int) -> None:
    bench.backend.wrong_lengths = [wrong]
    assert bench.store.put_many(bench.keys, VALUES) == [WRITTEN] * 6
    bench.backend.wrong_lengths = [wrong] * 2
    assert bench.store.get_many(bench.keys) == [Ok(value) for value in VALUES]
    bench.backend.wrong_lengths = [wrong] * 9
    assert bench.store.get_many(bench.keys) == [Transient("result_count")] * 6


def test_the_deadline_ends_the_retries(bench: Bench) -> None:
    bench.script(3, *[bench.codes.transient] * 9)
    results = bench.store.put_many(bench.keys, VALUES, timeout_s=2.0)
    assert results == [WRITTEN] * 3 + [Transient(bench.codes.transient)] + [WRITTEN] * 2
    assert bench.clock.now() < 1002.0


def test_cancelled_in_a_pause(bench: Bench) -> None:
    bench.script(0, *[bench.codes.transient] * 9)
    cancellation = Cancellation()
    bench.clock.on_sleep = lambda token: cancellation.cancel()
    results = bench.store.put_many(bench.keys, VALUES, cancellation=cancellation)
    assert results == [Transient(bench.codes.transient)] + [WRITTEN] * 5
    assert len(bench.sent()) == 1


def test_cancelled_between_batches(bench: Bench) -> None:
    cancellation = Cancellation()
    store = bench.with_policy(Policy(batch_keys=2))
    bench.backend.on_batch = cancellation.cancel
    results = store.put_many(bench.keys, VALUES, cancellation=cancellation)
    assert results == [WRITTEN] * 2 + [Transient("cancelled")] * 4


def test_buffers_are_free_after_an_error(bench: Bench) -> None:
    for ends in ([bench.codes.transient] * 9, [bench.codes.final], [bench.codes.full] * 9):
        value = bytearray(b"value" * 1000)
        bench.script(0, *ends)
        assert not isinstance(bench.store.put_many(bench.keys[:1], [memoryview(value)])[0], Ok)
        value.clear()  # with a view alive this were a BufferError
        bench.backend.script.clear()


def test_buffers_are_free_after_a_defect(bench: Bench) -> None:
    values = [bytearray(b"value" * 1000) for _ in bench.keys]
    bench.backend.defects = [TypeError("a defect")]
    with pytest.raises(TypeError, match="a defect"):
        bench.store.put_many(bench.keys, [memoryview(value) for value in values])
    for value in values:
        value.clear()
    assert bench.store.put_many(bench.keys, VALUES) == [WRITTEN] * 6, "and the backend works as before"
    assert bench.store.get_many(bench.keys) == [Ok(value) for value in VALUES]
