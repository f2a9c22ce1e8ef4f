"""Routing on shared memory decides as the plain library does, and leaves nothing behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from random import Random

import pytest

from pointsman.config.snapshot import Profile, Snapshot, WorkerSpec
from pointsman.daemon.dispatch.router import Ask, LiveRouter
from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.picking import REASONS
from pointsman.daemon.routing.prompt import Request
from pointsman.daemon.routing.request import json_features
from pointsman.daemon.routing.router import Decision, Router
from pointsman.daemon.routing.router import Worker as LibraryWorker
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import UNLOCKED, Booked
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment

SLOTS = (3, 0, 2, 5)
"""Declaration order is not the order of slots."""


class First:
    """Ties go to the first."""

    def random(self) -> float:
        return 0.0


def new_state(shards: int = 2) -> RoutingState:
    return RoutingState.create(Segment.create(shards, 8), IndexSize(4, 512), 2**26)


def specs(**fields: object) -> tuple[WorkerSpec, ...]:
    return tuple(
        WorkerSpec(
            id=f"w{slot}",
            url=f"http://127.0.0.1:{9000 + slot}",
            slot=slot,
            address="127.0.0.1",
            host="127.0.0.1",
            port=9000 + slot,
            **fields,  # type: ignore[arg-type]
        )
        for slot in SLOTS
    )


class Bench:
    """One gateway of two shards, seen from shard 0 and 1."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.state = new_state()
        self.table = RoutingTable(snapshot)
        self.routers = [LiveRouter(self.state, shard, First()) for shard in range(2)]
        for worker in snapshot.workers:
            self.state.segment.set_status(worker.slot, at.STATUS_UP)

    def choose(self, shard: int, text: str, now: float, headers: dict[str, str] | None = None) -> Booked:
        body = json.dumps({"stream": True, "messages": [{"role": "user", "content": text}]}).encode()
        features = json_features(body)
        router = self.routers[shard]
        tokens = router.read_prompt(features)
        plan, _ = self.table.plan_for(None, "", "/v1/chat/completions", lambda _: None, tokens)
        return router.choose(Ask(features, len(body), headers), self.table, self.table.everyone, plan, tokens, now)

    def is_empty(self) -> bool:
        state = self.state
        return state.index.check() == [] and all(
            (state.bookings.in_flight(slot), state.segment.inflight(slot), state.index.pinned(slot)) == (0, 0, 0)
            for slot in range(8)
        )


@pytest.fixture
def bench() -> Bench:
    return Bench(Snapshot(1, workers=specs()))


def prompts(rng: Random) -> Iterator[str]:
    heads = ["".join(rng.choices("abcdef ", k=rng.randrange(200, 4000))) for _ in range(6)]
    while True:
        yield rng.choice(heads) + "".join(rng.choices("xyz ", k=rng.randrange(0, 1500)))


@pytest.mark.parametrize(
    ("strategy", "kv_tokens"),
    [
        ("expected_cost", None),
        ("expected_cost", 4000),  # with the other policies eviction, whose order may lag, would soon decide
        ("cache_aware", None),
        ("lmetric", None),
        ("least-request:1,prefix-cache:2", None),
    ],
)
def test_decides_as_the_library_does(strategy: str, kv_tokens: int | None) -> None:
    workers = specs(kv_tokens=kv_tokens)
    bench = Bench(Snapshot(1, workers=workers, default_policy=strategy))
    library = Router([LibraryWorker(w.url, kv_tokens) for w in workers], strategy)
    library._rng = First()  # type: ignore[assignment]
    for worker in workers:
        bench.state.set_kv_tokens(worker.slot, kv_tokens or 0)
    bench.state.fit_ghost(2**26, tuple(w.slot for w in workers))
    rng, now = Random(7), 100.0
    texts = prompts(rng)
    live: list[tuple[int, Booked, Decision]] = []
    for number in range(400):
        now += rng.expovariate(20)
        if live and rng.random() < 0.5:
            shard, booked, decision = live.pop(rng.randrange(len(live)))
            if rng.random() < 0.8:
                bench.routers[shard].first_token(booked, now)
                library.first_token(decision, now)
            now += 0.01
            tokens = rng.choice([None, rng.randrange(1, 300)])
            bench.routers[shard].finish(booked, now, tokens)
            library.finish(decision, now, tokens)
        text = next(texts)
        booked = bench.choose(number % 2, text, now)
        decision = library.choose(Request(prompt=text.encode()), now)
        assert (booked.worker.url, REASONS[booked.reason]) == (decision.worker, decision.reason), number
        assert booked.cached_tokens == decision.matched_tokens
        assert booked.predicted_s == pytest.approx(decision.predicted_ttft_s)
        live.append((number % 2, booked, decision))
    assert len({booked.slot for _, booked, _ in live}) > 1
    for shard, booked, _ in live:
        bench.routers[shard].finish(booked, now, 10)
    assert bench.is_empty()


def test_the_short_way_and_the_long_way_agree(bench: Bench) -> None:
    other = Bench(bench.table.snapshot)
    rng, now = Random(3), 5.0
    texts = prompts(rng)
    for number in range(200):
        now += rng.expovariate(30)
        text = next(texts)
        short = bench.choose(number % 2, text, now)
        long = other.choose(number % 2, text, now, {"x-whatever": "1"})
        assert (short.slot, short.reason, short.cached_tokens) == (long.slot, long.reason, long.cached_tokens)
        assert short.predicted_s == pytest.approx(long.predicted_s)
        if number % 3:
            for gateway, booked in ((bench, short), (other, long)):
                gateway.routers[number % 2].finish(booked, now, 50)
    assert bench.state.bookings.lost == pytest.approx(other.state.bookings.lost)


def test_what_a_dead_shard_had_booked_is_given_back_and_the_rest_stays(bench: Bench) -> None:
    kept = bench.choose(1, "a" * 5000, 1.0)
    for number in range(5):
        bench.choose(0, f"{number}" * 2000, 1.0)
    bench.state.segment.reclaim_shard(0)
    assert bench.state.reclaim_shard(0)
    assert sum(bench.state.bookings.in_flight(slot) for slot in SLOTS) == 1
    assert bench.state.index.pinned(kept.slot) == 5000
    bench.routers[1].finish(kept, 2.0, 5)
    assert bench.is_empty()


def test_nobody_is_up(bench: Bench) -> None:
    for slot in SLOTS:
        bench.state.segment.set_status(slot, at.STATUS_DOWN)
    for headers in (None, {"routing-strategy": "random"}):
        with pytest.raises(RequestError, match="none of the 4 workers is healthy") as caught:
            bench.choose(0, "hello", 1.0, headers)
        assert caught.value.status == 503
    assert bench.is_empty()


def test_a_stopped_holder_of_the_mutex_costs_the_booking_not_the_request(bench: Bench) -> None:
    other = RoutingState.attach(bench.state.segment, bench.state.index.fd)
    booked = bench.choose(0, "x" * 1000, 1.0)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        assert other.words.lock()
        taken.set()
        done.wait(30)
        other.words.unlock()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(30)
    try:
        for headers in (None, {"x-session-id": "s"}):
            unlocked = bench.choose(0, "x" * 1000, 2.0, headers)
            assert (unlocked.reason, unlocked.number) == (UNLOCKED, -1)
            bench.routers[0].finish(unlocked, 2.5, 4)
        bench.routers[0].finish(booked, 3.0, 7)
    finally:
        done.set()
        holder.join()
    assert bench.state.segment.inflight(booked.slot) == 0
    assert bench.state.bookings.in_flight(booked.slot) == 1
    bench.routers[0].settle(4.0)
    assert bench.is_empty()


def test_sessions_stay_and_are_forgotten_with_their_worker() -> None:
    profile = Profile("p", "least_request", routing={"sticky": {"factor": 2.0}})
    bench = Bench(Snapshot(1, workers=specs(), profiles={"p": profile}, default_profile="p"))
    first = bench.choose(0, "hello", 1.0, {"x-session-id": "alice"})
    bench.routers[0].finish(first, 1.1, 3)
    again = bench.choose(1, "something else", 2.0, {"x-session-id": "alice"})
    assert (again.slot, REASONS[again.reason]) == (first.slot, "sticky")
    bench.routers[1].finish(again, 2.1, 3)
    assert bench.state.clear_worker(first.slot)
    assert len(bench.state.sessions) == 0


def test_users_are_charged_on_all_shards_and_corrected_at_the_end(bench: Bench) -> None:
    headers = {"user": "alice", "routing-strategy": "vtc-basic"}
    booked = bench.choose(0, "x" * 4000, 1.0, headers)
    ((least, most), key) = bench.state.users.range(1.0, 150.0), booked.user_key
    assert least == most == 4000.0
    bench.routers[0].finish(booked, 1.0, 100)
    held = bench.state.users.get(key)
    assert held is not None
    assert held[1] == pytest.approx(4000 - 3 * 1000 + 2 * 100)


def test_a_bad_strategy_is_refused_before_anything_is_booked(bench: Bench) -> None:
    with pytest.raises(RequestError, match="nonsense") as caught:
        bench.choose(0, "hello", 1.0, {"routing-strategy": "nonsense"})
    assert caught.value.status == 400
    assert bench.is_empty()
    bench.routers[0].finish(bench.choose(0, "hello", 1.0), 2.0, 1)
    assert bench.is_empty()


def test_explaining_books_nothing(bench: Bench) -> None:
    bench.routers[0].finish(bench.choose(0, "y" * 3000, 1.0), 2.0, 1)
    features = json_features(json.dumps({"prompt": "y" * 3000}).encode())
    explainer = LiveRouter(bench.state, -1, First())
    tokens = explainer.read_prompt(features)
    plan, _ = bench.table.plan_for(None, "", "/v1/completions", lambda _: None, tokens)
    before = bench.state.index.totals()
    explanation, picked = explainer.explain(Ask(features, 3000), bench.table, bench.table.everyone, plan, tokens, 3.0)
    assert explanation.matched_tokens is not None
    assert explanation.matched_tokens[picked.worker] == 749
    assert bench.state.index.totals() == before
    assert bench.is_empty()
