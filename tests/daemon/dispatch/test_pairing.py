"""Which two workers a request gets: lengths of prompts, compatibility, hosts, what decode holds already, and turns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from pointsman.config.snapshot import Profile, Snapshot, WorkerSpec
from pointsman.daemon.dispatch.pairing import BUSY_S, NEAR_SLACK, Alone, PairAsk, Paired, PairRouter
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.dispatch.router import Ask, LiveRouter
from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.request import json_features
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import NEUTRAL, SUCCEEDED
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment

PREFILL, DECODE, OTHER_PREFILL, OTHER_DECODE, COMBINED = range(5)
LEAST = {"prefill_policy": "least_request", "decode_policy": "least_request"}
SHORT, LONG = "word " * 20, "word " * 2000


def spec(slot: int, role: str | None = None, **fields: Any) -> WorkerSpec:
    role = role or ("prefill", "decode")[slot % 2]
    base: dict[str, Any] = {"address": f"10.0.0.{slot}", "host": f"h{slot}", "port": 80, "kv_connector": "nixl"}
    return WorkerSpec(**{"id": f"w{slot}", "url": f"http://h{slot}", "slot": slot, "role": role, **base, **fields})


class Bench:
    """One shard of two."""

    def __init__(self, *workers: WorkerSpec, **pd: Any) -> None:
        self.state = RoutingState.create(Segment.create(2, 8), IndexSize(4, 512), 2**26)
        profile = Profile("p", "pd", pd={**LEAST, **pd})
        self.table = RoutingTable(Snapshot(1, workers=workers, profiles={"p": profile}, default_profile="p"))
        self.plan = self.table.plan_of(profile)
        self.live = LiveRouter(self.state, 0, Random(7))
        self.router = PairRouter(self.state, self.live, SharedResilience(self.state, 0))
        for worker in workers:
            self.state.segment.set_status(worker.slot, at.STATUS_UP)
        self.now = 100.0

    def choose(self, text: str = SHORT, failed: Sequence[int] = (), **asked: Any) -> Paired | Alone:
        body = json.dumps({"prompt": text, "max_tokens": 8}).encode()
        features = json_features(body)
        tokens = self.live.read_prompt(features)
        pools = self.table.pairs_for("", self.plan)
        assert pools is not None
        ask = PairAsk(Ask(features, len(body)), **asked)
        found = self.router.choose(ask, self.table, pools, self.plan, tokens, self.now, failed)
        assert found is not None, "it waits for memory"
        return found

    def slots(self, text: str = SHORT, failed: Sequence[int] = ()) -> tuple[int, ...]:
        """Of prefill and decode worker, or of who does it alone; its bookings are over, and computed."""
        found = self.choose(text, failed)
        sides = [found.side] if isinstance(found, Alone) else [found.prefill, found.decode]
        for side in sides:
            self.router.finish(side, self.now, SUCCEEDED, was_computed=True)
        return tuple(side.booked.slot for side in sides)

    def is_empty(self) -> bool:
        return all(self.state.segment.is_empty(slot) for slot in range(8)) and self.state.index.check() == []


# --- lengths of prompts


def test_pairs_by_the_length_of_the_prompt() -> None:
    """AIBrix's buckets: both sides must take it, and both ends of a range are in it."""
    short: dict[str, Any] = {"prompt_tokens_max": 100}
    long: dict[str, Any] = {"prompt_tokens_min": 101}
    bench = Bench(
        spec(PREFILL, **short), spec(DECODE, **short), spec(OTHER_PREFILL, **long), spec(OTHER_DECODE, **long)
    )
    assert {bench.slots(SHORT) for _ in range(10)} == {(PREFILL, DECODE)}
    assert {bench.slots(LONG) for _ in range(10)} == {(OTHER_PREFILL, OTHER_DECODE)}
    assert bench.is_empty()


def test_one_side_with_a_bucket_is_enough() -> None:
    bench = Bench(spec(PREFILL), spec(DECODE, prompt_tokens_max=100), spec(OTHER_DECODE))
    assert {bench.slots(LONG) for _ in range(10)} == {(PREFILL, OTHER_DECODE)}


def test_a_combined_worker_takes_what_no_pair_does() -> None:
    combined = spec(COMBINED, "regular", labels={"combined": "true"})
    bench = Bench(spec(PREFILL, prompt_tokens_max=100), spec(DECODE), combined)
    assert bench.slots(LONG) == (COMBINED,)
    assert bench.slots(SHORT) == (PREFILL, DECODE)
    bench.state.segment.set_status(DECODE, at.STATUS_DOWN)
    assert bench.slots(SHORT) == (COMBINED,)
    assert bench.is_empty()


def test_an_idle_combined_worker_helps_busy_pairs() -> None:
    """While somebody of the pairs has more than a second of work, and it has less than a quarter of one."""
    combined = spec(COMBINED, "regular", labels={"combined": "true"})
    bench = Bench(spec(PREFILL), spec(DECODE), combined)
    chosen = [bench.choose(f"{number} {LONG * 4}") for number in range(12)]
    alone = [isinstance(found, Alone) for found in chosen]
    wait_s = bench.state.bookings.wait_s
    assert wait_s(PREFILL, bench.now) > BUSY_S
    assert not alone[0], "nobody is busy"
    assert any(alone), "pairs were busy"
    assert not alone[-1], "it is busy itself"


def test_a_combined_worker_goes_before_waiting_for_memory() -> None:
    combined = spec(COMBINED, "regular", labels={"combined": "true"})
    bench = Bench(spec(PREFILL), spec(DECODE), combined)
    with bench.state.locked():
        bench.state.bookings.set_kv_chars(DECODE, 1)
    first, second = bench.choose(), bench.choose()
    assert isinstance(first, Paired)
    assert isinstance(second, Alone)
    assert second.side.booked.slot == COMBINED


def test_a_regular_worker_that_is_not_combined_takes_nothing() -> None:
    bench = Bench(spec(PREFILL, prompt_tokens_max=100), spec(DECODE, prompt_tokens_max=100), spec(COMBINED, "regular"))
    with pytest.raises(RequestError, match="a prompt of"):
        bench.slots(LONG)


# --- who fits whom


@pytest.mark.parametrize("field", ["group", "connector", "model"])
def test_only_workers_that_fit_each_other_are_paired(field: str) -> None:
    def of(value: str) -> dict[str, Any]:
        if field == "group":
            return {"labels": {"pd_group": value}}
        return {"kv_connector": {"a": "nixl", "b": "mooncake"}[value]} if field == "connector" else {"models": (value,)}

    bench = Bench(spec(0, **of("a")), spec(1, **of("a")), spec(2, **of("b")), spec(3, **of("b")))
    if field == "model":
        pools = [bench.table.pairs_for(name, bench.plan) for name in "ab"]
        assert [None if one is None else one.compatible for one in pools] == [((0, 1),), ((2, 3),)]
    else:
        assert {bench.slots(f"{number} {SHORT}") for number in range(20)} == {(0, 1), (2, 3)}


def test_the_same_host_is_preferred_until_it_is_much_busier() -> None:
    near: dict[str, Any] = {"address": "10.1.0.1"}
    bench = Bench(spec(PREFILL, **near), spec(DECODE), spec(OTHER_DECODE, **near))
    found = [bench.choose(f"{number} {SHORT}") for number in range(NEAR_SLACK + 3)]
    decodes = [pair.decode.booked.slot for pair in found if isinstance(pair, Paired)]
    assert decodes[: NEAR_SLACK + 1] == [OTHER_DECODE] * (NEAR_SLACK + 1)
    assert DECODE in decodes[NEAR_SLACK + 1 :]


def test_another_attempt_has_another_pair() -> None:
    bench = Bench(*map(spec, range(4)))
    assert {bench.slots(failed=(PREFILL,))[0] for _ in range(10)} == {OTHER_PREFILL}
    assert {bench.slots(failed=(DECODE,))[1] for _ in range(10)} == {OTHER_DECODE}
    assert {bench.slots(failed=(PREFILL, DECODE)) for _ in range(10)} == {(OTHER_PREFILL, OTHER_DECODE)}


# --- decode alone


def test_a_prompt_that_decode_holds_nearly_all_of_goes_to_decode_alone() -> None:
    bench = Bench(spec(PREFILL), spec(DECODE), min_uncached_tokens=500)
    assert bench.slots(LONG) == (PREFILL, DECODE)
    assert bench.slots(LONG) == (DECODE,), "it holds the prompt now"
    assert bench.slots(LONG + "and another rest " * 400) == (PREFILL, DECODE)
    assert bench.slots(SHORT) == (DECODE,)


def test_decode_workers_of_sglang_never_prefill() -> None:
    bench = Bench(spec(0, kv_connector="sglang"), spec(1, kv_connector="sglang"), min_uncached_tokens=500)
    assert [bench.slots(SHORT) for _ in range(3)] == [(PREFILL, DECODE)] * 3


# --- turns


def test_both_sides_take_turns() -> None:
    """With one cursor for the two picks of a pair, each side would leave every other worker out."""
    bench = Bench(*map(spec, range(4)), prefill_policy="round_robin", decode_policy="round_robin")
    found = [bench.slots() for _ in range(20)]
    assert Counter(prefill for prefill, _ in found) == {PREFILL: 10, OTHER_PREFILL: 10}
    assert Counter(decode for _, decode in found) == {DECODE: 10, OTHER_DECODE: 10}


def test_a_pick_that_comes_to_nothing_leaves_no_booking() -> None:
    bench = Bench(*map(spec, range(4)))
    found = bench.choose()
    assert isinstance(found, Paired)
    assert not bench.is_empty()
    for side in (found.prefill, found.decode):
        bench.router.finish(side, bench.now, NEUTRAL, was_computed=False)
    assert bench.is_empty()
