"""The engine over a scripted backend, on a virtual clock."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import pytest

from pointsman.daemon.stores import retransmission
from pointsman.daemon.stores.cancellation import Cancellation
from pointsman.daemon.stores.counters import Totals
from pointsman.daemon.stores.results import (
    Corrupt,
    Failure,
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
from tests.daemon.stores.scripted import ScriptedBackend, VirtualClock

Line = dict[str, object]


class Bench:
    def __init__(self, policy: Policy | None = None) -> None:
        self.backend = ScriptedBackend()
        self.clock = VirtualClock()
        self.store = RetransmittingStore(self.backend, policy, clock=self.clock, rng=random.Random(1))


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    found: list[Line] = []
    monkeypatch.setattr(retransmission, "log", lambda event, level, **fields: found.append({"level": level, **fields}))
    return found


def keys_of(count: int) -> list[str]:
    return [f"k{number}" for number in range(count)]


def written(store: RetransmittingStore, keys: Sequence[str]) -> None:
    require_all("put", keys, store.put_many(keys, [key.encode() for key in keys]))


WRITTEN = Ok(Written())


def test_only_the_failed_keys_are_sent_again(bench: Bench, lines: list[Line]) -> None:
    bench.backend.script["k1"] = [-800, -800]
    bench.backend.script["k3"] = [-800]
    results = bench.store.put_many(keys_of(5), [b"%d" % number for number in range(5)])
    assert results == [WRITTEN] * 5
    assert bench.backend.batches == [keys_of(5), ["k1", "k3"], ["k1"]]
    totals = bench.store.totals()
    assert (totals.retried, totals.recovered, totals.exhausted) == (3, 2, 0)
    assert totals.failures == {("put", -800): 3} and totals.keys == {"put": 5}
    (line,) = lines
    assert line["level"] == "info" and line["recovered"] == 2 and line["codes"] == {"-800": 3}


def test_totals_since_another_look(bench: Bench) -> None:
    written(bench.store, ["a"])
    before = bench.store.totals()
    assert before.since(before) == Totals({"put": 0})
    bench.backend.script["a"] = [-800]
    assert bench.store.get_many(["a", "b"]) == [Ok(b"a"), Missing()]
    since = bench.store.totals().since(before)
    assert (since.keys, since.retried, since.recovered, since.exhausted) == ({"put": 0, "get": 2}, 1, 1, 0)
    assert since.failures == {("get", -800): 1, ("get", "missing"): 1}


def test_every_attempt_sends_the_same_memory(bench: Bench) -> None:
    bench.backend.script["a"] = [-800, -900, -901]
    value = bytearray(b"large")
    bench.store.put_many(["a"], [value])
    assert bench.backend.sent == [("a", id(value))] * 4
    value.clear()  # nobody holds it any more: with a view alive this were a BufferError


def test_order_and_slots_are_kept_over_batches_and_threads() -> None:
    bench = Bench(Policy(batch_keys=7))
    bench.backend.threads = 4
    keys = keys_of(100)
    written(bench.store, keys)
    for number in range(0, 100, 3):
        bench.backend.script[f"k{number}"] = [-800]
    for number in range(1, 100, 10):
        del bench.backend.frames[f"k{number}"]
    results = bench.store.get_many(keys)
    for number, result in enumerate(results):
        expected = Missing() if number % 10 == 1 and number % 3 else Ok(f"k{number}".encode())
        assert result == (Missing() if number % 10 == 1 else expected)
    bench.store.close()


def test_mixed_final_and_transient(bench: Bench, lines: list[Line]) -> None:
    written(bench.store, keys_of(5))
    bench.backend.batches.clear()
    bench.backend.script.update({"k0": [-704], "k1": [-600], "k2": [-800], "k3": [-800] * 9})
    results = bench.store.get_many(keys_of(5))
    assert results == [Missing(), Invalid(-600), Ok(b"k2"), Transient(-800), Ok(b"k4")]
    assert bench.backend.batches == [keys_of(5), ["k2", "k3"], ["k3"], ["k3"]]
    totals = bench.store.totals()
    assert (totals.retried, totals.recovered, totals.exhausted) == (4, 1, 1)
    (line,) = lines
    assert line["level"] == "warning" and line["failed"] == "k3: Transient(-800)"


def test_final_codes_alone_wait_for_nothing_and_say_nothing(bench: Bench, lines: list[Line]) -> None:
    bench.backend.script.update({"a": [-600], "b": [-704]})
    assert bench.store.get_many(["a", "b", "c"]) == [Invalid(-600), Missing(), Missing()]
    assert bench.clock.pauses == [] and lines == []
    assert bench.store.totals().failures == {("get", -600): 1, ("get", "missing"): 2}


def test_of_a_write_nothing_is_missing(bench: Bench) -> None:
    bench.backend.script["a"] = [-704]
    assert bench.store.put_many(["a"], [b"x"]) == [WRITTEN]


def test_an_unknown_code_is_sent_again(bench: Bench) -> None:
    bench.backend.script["a"] = [-4711]
    assert bench.store.put_many(["a"], [b"x"]) == [WRITTEN]


def test_pauses_double_with_jitter_and_are_longer_when_full(bench: Bench) -> None:
    bench.backend.script["a"] = [-800] * 9
    assert bench.store.put_many(["a"], [b"x"], timeout_s=100) == [Transient(-800)]
    for pause, whole in zip(bench.clock.pauses, (1, 2, 4), strict=True):
        assert whole / 2 <= pause <= whole
    bench.clock.pauses.clear()
    bench.backend.script["a"] = [-200] * 9
    assert bench.store.put_many(["a"], [b"x"], timeout_s=100) == [NoSpace(-200)]
    for pause, whole in zip(bench.clock.pauses, (2, 4, 8), strict=True):
        assert whole / 2 <= pause <= whole


@pytest.mark.parametrize("misread", [lambda frame: frame[:-1], lambda frame: b"", lambda frame: frame[:-1] + b"\0"])
def test_a_short_or_flipped_read_is_read_again_and_never_data(bench: Bench, misread: Callable[[bytes], bytes]) -> None:
    written(bench.store, ["a", "b"])
    bench.backend.misreads["a"] = [misread]
    assert bench.store.get_many(["a", "b"]) == [Ok(b"a"), Ok(b"b")]
    bench.backend.misreads["a"] = [misread] * 9
    first, second = bench.store.get_many(["a", "b"])
    assert isinstance(first, Corrupt) and second == Ok(b"b")
    assert bench.store.totals().exhausted == 1


@pytest.mark.parametrize("wrong", [-1, 1])
def test_another_number_of_results_tells_nothing_of_any_key(bench: Bench, wrong: int) -> None:
    bench.backend.wrong_lengths = [wrong]
    assert bench.store.put_many(["a", "b"], [b"1", b"2"]) == [WRITTEN] * 2
    bench.backend.wrong_lengths = [wrong]
    assert bench.store.get_many(["a", "b"]) == [Ok(b"1"), Ok(b"2")]
    bench.backend.wrong_lengths = [wrong] * 9
    assert bench.store.get_many(["a", "b"]) == [Transient("result_count")] * 2


def test_the_deadline_bounds_the_pauses(bench: Bench) -> None:
    bench.backend.script["a"] = [-800] * 9
    assert bench.store.put_many(["a", "b"], [b"1", b"2"], timeout_s=2.2) == [Transient(-800), WRITTEN]
    assert bench.clock.now() < 1002.2


def test_what_had_no_turn_before_the_deadline_says_so() -> None:
    bench = Bench(Policy(batch_keys=2))

    def slow(keys: Sequence[str]) -> None:
        bench.clock.time_s += 4

    bench.backend.on_batch = slow
    results = bench.store.put_many(keys_of(6), [b"x"] * 6, timeout_s=5)
    assert results == [WRITTEN] * 4 + [Transient("deadline")] * 2
    assert len(bench.backend.batches) == 2


def test_cancelled_between_batches() -> None:
    bench = Bench(Policy(batch_keys=2))
    cancellation = Cancellation()
    bench.backend.on_batch = lambda keys: cancellation.cancel()
    results = bench.store.put_many(keys_of(4), [b"x"] * 4, cancellation=cancellation)
    assert results == [WRITTEN] * 2 + [Transient("cancelled")] * 2
    assert not bench.clock.pauses


def test_cancelled_in_a_pause_keeps_the_last_codes(bench: Bench) -> None:
    bench.backend.script["a"] = [-800] * 9
    cancellation = Cancellation()
    bench.clock.on_sleep = lambda token: cancellation.cancel()
    assert bench.store.put_many(["a"], [b"x"], cancellation=cancellation) == [Transient(-800)]
    assert len(bench.backend.batches) == 1


def test_closing_ends_the_pauses_and_then_the_backend(bench: Bench) -> None:
    store = RetransmittingStore(bench.backend, Policy(base_s=3600, max_pause_s=3600, timeout_s=9999))
    bench.backend.script["a"] = [-800] * 9
    is_sent = threading.Event()
    bench.backend.on_batch = lambda keys: is_sent.set()
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.extend(store.put_many(["a"], [b"x"])))
    thread.start()
    assert is_sent.wait(30)
    store.close()
    assert bench.backend.is_closed
    thread.join(30)
    assert results == [Transient(-800)]
    assert store.put_many(["b"], [b"x"]) == [Transient("cancelled")]


def test_batches_by_number_and_by_size() -> None:
    bench = Bench(Policy(batch_keys=3, batch_bytes=1000))
    written(bench.store, keys_of(7))
    assert [len(batch) for batch in bench.backend.batches] == [3, 3, 1]
    bench.backend.batches.clear()
    sizes = [600, 300, 200, 2000, 10, 10]
    require_all("put", keys_of(6), bench.store.put_many(keys_of(6), [bytes(size) for size in sizes]))
    assert bench.backend.batches == [["k0", "k1"], ["k2"], ["k3"], ["k4", "k5"]]


def test_no_more_threads_than_allowed() -> None:
    bench = Bench(Policy(batch_keys=1, threads=3))
    bench.backend.threads = 8
    meet = threading.Barrier(3)
    names: set[str] = set()

    def note(keys: Sequence[str]) -> None:
        names.add(threading.current_thread().name)
        meet.wait(30)

    bench.backend.on_batch = note
    written(bench.store, keys_of(9))
    assert len(names) == 3
    bench.store.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_defect_of_the_backend_is_raised_when_all_buffers_are_free(threads: int) -> None:
    bench = Bench(Policy(batch_keys=1))
    bench.backend.threads = threads
    under_way = 0
    lock = threading.Lock()

    def break_down(keys: Sequence[str]) -> None:
        nonlocal under_way
        with lock:
            under_way += 1
        try:
            if keys == ["k1"]:
                raise TypeError("a defect")
        finally:
            with lock:
                under_way -= 1

    bench.backend.on_batch = break_down
    values = [bytearray(b"x") for _ in range(8)]
    with pytest.raises(TypeError, match="a defect"):
        bench.store.put_many(keys_of(8), values)
    assert under_way == 0
    for value in values:
        value.clear()
    bench.store.close()


@pytest.mark.parametrize(
    ("key", "code"), [("", "empty_key"), ("x" * 1025, "long_key"), ("é" * 513, "long_key"), ("\ud800", "key_text")]
)
def test_impossible_keys_are_not_sent(bench: Bench, key: str, code: str) -> None:
    assert bench.store.put_many([key, "b"], [b"x", b"y"]) == [Invalid(code), WRITTEN]
    assert bench.store.get_many([key, "b"]) == [Invalid(code), Ok(b"y")]
    assert bench.store.delete_many([key]) == [Invalid(code)]
    assert bench.store.stat_many([key]) == [Invalid(code)]


def test_impossible_values_are_not_sent(bench: Bench) -> None:
    results = bench.store.put_many(["a", "b", "c"], [{1}, bytes(2 << 20), b"fine"])  # type: ignore[list-item]
    assert results == [Invalid("type"), Invalid("too_large"), WRITTEN]
    assert bench.backend.batches == [["c"]]


def test_one_key_twice_in_one_write(bench: Bench) -> None:
    assert bench.store.put_many(["a", "a"], [b"1", b"2"]) == [WRITTEN, Invalid("duplicate_key")]
    assert bench.store.get_many(["a", "a"]) == [Ok(b"1"), Ok(b"1")]


def test_nothing_asked_nothing_done(bench: Bench) -> None:
    assert bench.store.put_many([], []) == []
    assert bench.store.get_many([]) == []
    assert bench.backend.batches == []
    with pytest.raises(ValueError, match="1 keys, but 0 values"):
        bench.store.put_many(["a"], [])


def test_the_error_names_some_keys_and_reports_what_went_through() -> None:
    keys = keys_of(30)
    results: list[Ok[None] | Failure] = [Ok(None) if number < 10 else Transient(-800) for number in range(30)]
    with pytest.raises(TransferError) as caught:
        require_all("put", keys, results)
    error = caught.value
    assert error.succeeded == keys[:10] and list(error.failed) == keys[10:]
    assert error.failed["k10"] == Transient(-800)
    assert "20 of 30 keys failed, 10 went through: k10: Transient(-800), k11" in str(error)
    assert "… (12 more)" in str(error) and len(str(error)) < 400
