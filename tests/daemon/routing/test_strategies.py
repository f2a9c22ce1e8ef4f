"""AIBrix's syntax, combination, precedence and refusals as tables; ranked narrowing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.chain import Narrowing, Stage, Weighted, normalised, parse_strategy
from pointsman.daemon.routing.picking import Situation
from pointsman.daemon.routing.prompt import EMPTY_CHAIN, Request
from pointsman.daemon.routing.rng import SplitMix
from pointsman.daemon.routing.router import Router, Signals, Worker
from pointsman.daemon.routing.scorers import Scorer, Scores
from pointsman.daemon.routing.strategies import STRATEGIES, RoutingProfile, build, read_profile

BLOCK = tuple(range(1, 11))


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("least-request", [("least_request", 1)]),
        ("prefix-cache:2,least-request", [("prefix_cache", 2), ("least_request", 1)]),
        (" least-request : 40 , prefix-cache:60 ", [("least_request", 40), ("prefix_cache", 60)]),
        ("nobody-knows:0,least-request", [("least_request", 1)]),
        ("pd:0,random", [("random", 1)]),
        ("least-request:5,pd:3,bogus", [("pd", 1)]),
        ("throughput,slo-pack-load,pd", [("slo_pack_load", 1)]),
        ("random,random:3", [("random", 1), ("random", 3)]),
        ("throughput:1000000", [("throughput", 1000000)]),
    ],
)
def test_syntax(text: str, entries: list[tuple[str, int]]) -> None:
    assert [(entry.name, entry.weight) for entry in parse_strategy(text)] == entries


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "least-request,",
        ":5",
        "least-request:1:2",
        "least-request:-1",
        "least-request:1.5",
        "least-request:x",
        "least-request:",
        "least-request:1000001",
        "least-request:²",
        "least-request:0,prefix-cache:0",
        "bogus",
        "Least-Request",
        "least-request,bogus",
        "least-request,power-of-two",
        "least-request,cache_aware",
        "pd",
        "slo-least-load,least-request",
    ],
)
def test_refusals_are_400s_never_random(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        build(RoutingProfile(), text) if text else build(RoutingProfile(""))
    assert (caught.value.status, caught.value.code) == (400, "invalid_routing_strategy")


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_picks_and_explains(name: str) -> None:
    router = Router([Worker("a", 1000), Worker("b"), Worker("c", 1000)], name)
    headers = {"user": "u", "x-session-id": "s"}
    for turn in range(6):
        request = Request(blocks=BLOCK[: 1 + turn % 3], block_tokens=16, prompt_tokens=40, headers=headers)
        decision = router.choose(request, turn / 10, explain=True)
        assert decision.explanation is not None
        best = decision.explanation.totals
        assert decision.index in best
        router.first_token(decision, turn / 10 + 0.05)
        if turn % 2:
            router.finish(decision, turn / 10 + 0.08, 5)
    assert sum(load.in_flight for load in router.fleet.loads) == 3


def situation(workers: int) -> Situation:
    router = Router([Worker(str(number)) for number in range(workers)])
    return Situation(Request(), EMPTY_CHAIN, [0] * (workers + 1), range(workers), router.fleet, 0.0, SplitMix(1))


def scorer(name: str, values: list[float | None], *, is_least_best: bool = True) -> Scorer:
    return Scorer(name, is_least_best, lambda _: Scores(values))


def totals(entries: list[tuple[Scorer, float]]) -> list[float]:
    return [round(total, 9) for total in Weighted(entries).explain(situation(3)).totals.values()]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "is_least_best", "norms"),
    [
        ([10, 10, 8], True, [0, 0, 1]),
        ([80, 90, 50], False, [0.75, 1, 0]),
        ([5, 5, 5], True, [1, 1, 1]),
        ([5, None, 5], True, [1, 0, 1]),
        ([None, None, None], True, [0, 0, 0]),
        ([NAN, 1, 3], True, [0, 1, 0]),
        ([INF, 1, 3], False, [0, 0, 1]),
        ([-INF, NAN, 3], False, [0, 0, 1]),
    ],
)
def test_normalisation(values: list[float | None], is_least_best: bool, norms: list[float]) -> None:
    assert normalised(values, is_least_best=is_least_best) == norms


def test_the_published_example_ties_b_and_c() -> None:
    requests = scorer("least_request", [10, 10, 8])
    prefix = scorer("prefix_cache", [80, 90, 50], is_least_best=False)
    assert totals([(requests, 1), (prefix, 1)]) == [0.375, 0.5, 0.5]
    policy = Weighted([(requests, 1), (prefix, 1)])
    here = situation(3)
    assert {policy.pick(here).worker for _ in range(50)} == {1, 2}
    assert policy.explain(here).tied == (1, 2)


def test_the_published_example_through_a_router() -> None:
    """A: 10 requests, 80 % matched; B: 10, 90 %; C: 8, 50 %."""
    router = Router([Worker("a"), Worker("b"), Worker("c")], "least-request,prefix-cache")
    for worker, (requests, held) in enumerate([(10, 8), (10, 9), (8, 5)]):
        for number in range(requests):
            blocks = BLOCK[:held] if number == 0 else ()
            request = Request(blocks=blocks, block_tokens=16, prompt_tokens=16 * len(blocks) or 1)
            router.choose(request, 0.0, eligible=[worker])
    asked = Request(blocks=BLOCK, block_tokens=16, prompt_tokens=160)
    explanation = router.explain(asked, 0.0)
    assert explanation.totals == pytest.approx({0: 0.375, 1: 0.5, 2: 0.5})
    assert explanation.tied == (1, 2)
    assert explanation.columns[1].raw == pytest.approx({0: 80, 1: 90, 2: 50})
    assert router.choose(asked, 0.0).worker in {"b", "c"}


def test_weights_and_repeats_count() -> None:
    one, two = scorer("one", [0, 1, 2]), scorer("two", [2, 1, 0])
    assert totals([(one, 3), (two, 1)]) == [0.75, 0.5, 0.25]
    assert totals([(one, 1), (two, 1), (one, 2)]) == [0.75, 0.5, 0.25]


def test_sums_closer_than_the_tolerance_are_a_tie() -> None:
    policy = Weighted([(scorer("one", [0.0, 1e-10, 1.0]), 1)])
    assert policy.explain(situation(3)).tied == (0, 1)


def test_random_in_a_weighted_strategy_is_a_constant() -> None:
    router = Router([Worker("a"), Worker("b")], "random,least-request")
    router.choose(Request(), 0.0, eligible=[0])
    assert [router.explain(Request(), 0.0).totals[worker] for worker in (0, 1)] == [0.5, 1.0]


PRECEDENCE: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, None, "expected_cost"),
    ({"routingStrategy": "lmetric"}, None, "lmetric"),
    ({"routingStrategy": "lmetric"}, "least-latency", "least_latency"),
    ({"routingStrategy": "lmetric", "lockedRoutingStrategy": "dynamo"}, "least-latency", "dynamo"),
    ({"lockedRoutingStrategy": "dynamo"}, "bogus", "dynamo"),
    ({"chain": [{"scorer": "throughput"}]}, None, "throughput"),
    ({"chain": [{"scorer": "throughput"}]}, "vtc-basic", "vtc_basic"),
]


@pytest.mark.parametrize(("profile", "header", "used"), PRECEDENCE)
def test_precedence(profile: dict[str, Any], header: str | None, used: str) -> None:
    router = Router([Worker("a"), Worker("b")], profile)
    request = Request(headers={"routing-strategy": header} if header else {})
    columns = router.explain(request, 0.0).columns
    assert columns[0].name == ("wait_s" if used == "expected_cost" else used)


def test_a_bad_header_is_refused_and_nothing_is_booked() -> None:
    router = Router([Worker("a")])
    with pytest.raises(RequestError, match="incorrect routing strategy"):
        router.choose(Request(headers={"routing-strategy": "bogus"}), 0.0)
    assert router.fleet.loads[0].in_flight == 0


def test_profiles_as_aibrix_writes_them() -> None:
    profile = read_profile(
        {
            "routingStrategy": "prefix-cache:2,least-request",
            "requestsPerSecond": 0,
            "promptLenBucketMinLength": 0,
            "routingConfig": {
                "combined": False,
                "prefillScorePolicy": "prefix_cache",
                "cache-aware": {"miss": "least_load"},
            },
        }
    )
    assert profile.strategy == "prefix-cache:2,least-request"
    assert profile.cache_aware.miss == "least_load"
    with pytest.raises(RequestError, match="bad routing profile"):
        read_profile({"cache_aware": {"mis": "smallest_tree"}})


def narrowing(*stages: tuple[Scorer, dict[str, Any]]) -> Narrowing:
    return Narrowing([(scorer, Stage(scorer.name, **rules)) for scorer, rules in stages])


PREFIX = scorer("prefix", [90, 85, 10, 88], is_least_best=False)
QUEUE = scorer("queue", [7, 3, 0, 3])


@pytest.mark.parametrize(
    ("stages", "best"),
    [
        ([(PREFIX, {"within": 10}), (QUEUE, {})], {1, 3}),
        ([(PREFIX, {"keep": 2}), (QUEUE, {})], {3}),
        ([(QUEUE, {"within": 0}), (PREFIX, {})], {2}),
        ([(QUEUE, {"keep": 2}), (PREFIX, {})], {3}),  # the two threes are equal: both stay
        ([(PREFIX, {"within": 4, "weight": 1}), (QUEUE, {"weight": 0.5})], {0}),
        ([(PREFIX, {"weight": 1}), (QUEUE, {"weight": 10})], {2}),
        ([(scorer("dead", [None] * 4), {"keep": 1}), (QUEUE, {})], {2}),
        ([(scorer("half", [None, 2.0, None, 1.0]), {"keep": 3}), (QUEUE, {})], {1, 3}),
    ],
)
def test_ranked_narrowing(stages: list[tuple[Scorer, dict[str, Any]]], best: set[int]) -> None:
    policy, here = narrowing(*stages), situation(4)
    assert {policy.pick(here).worker for _ in range(30)} == best
    assert set(policy.explain(here).tied) == best


def test_narrowing_says_why_a_worker_was_dropped() -> None:
    explanation = narrowing((PREFIX, {"within": 10}), (QUEUE, {"keep": 1})).explain(situation(4))
    assert explanation.dropped == {
        2: "prefix: 10 is not within 10 of the best",
        0: "queue: 7 is not among the best 1",
    }


@given(
    values=st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=8),
    rules=st.fixed_dictionaries(
        {}, optional={"keep": st.integers(1, 9), "within": st.floats(0, 1e9), "weight": st.just(1.0)}
    ),
)
def test_whatever_scorers_say_an_eligible_worker_is_picked(values: list[float | None], rules: dict[str, Any]) -> None:
    here = situation(len(values))
    one = scorer("one", values)
    assert narrowing((one, rules)).pick(here).worker in range(len(values))
    assert Weighted([(one, 1)]).pick(here).worker in range(len(values))


def test_signals_decide_while_fresh_and_decay_to_own_counts() -> None:
    router = Router([Worker("a", 1000), Worker("b", 1000)], "least-gpu-cache")
    router.report(0, Signals(0.0, kv_usage=0.9))
    router.report(1, Signals(0.0, kv_usage=0.1))
    for _ in range(3):
        decision = router.choose(Request(prompt_tokens=100), 1.0)
        assert (decision.worker, decision.reason) == ("b", "load")
    stale = router.choose(Request(prompt_tokens=100), 60.0)
    assert (stale.worker, stale.reason) == ("a", "stale signal")


def test_vtc_lays_users_out_by_what_they_really_had() -> None:
    router = Router([Worker("a"), Worker("b"), Worker("c")], "vtc-basic")
    for _ in range(3):
        decision = router.choose(Request(prompt_tokens=1000, headers={"user": "heavy"}), 0.0)
        router.finish(decision, 0.0, 500)
    assert router.fleet.user_usage("heavy", 0.0) == (6000.0, 6000.0, 6000.0)
    assert router.fleet.user_usage("heavy", 150.0)[0] == 3000.0
    light = router.choose(Request(prompt_tokens=10, headers={"user": "light"}), 0.0)
    assert light.worker == "a"
    assert router.choose(Request(prompt_tokens=1000, headers={"user": "heavy"}), 0.0).worker == "c"


def test_session_affinity_by_address_and_by_key() -> None:
    router = Router([Worker("http://h:1"), Worker("http://h:2"), Worker("http://h:3")], "session-affinity")
    named = {"x-session-id": "aDoy"}  # base64 of h:2
    keyed = {"x-aibrix-session-key": "s"}
    assert {router.choose(Request(headers=named), 0.0).worker for _ in range(9)} == {"http://h:2"}
    assert len({router.choose(Request(headers=keyed), 0.0).worker for _ in range(9)}) == 1
    assert len({router.choose(Request(), 0.0).worker for _ in range(60)}) == 3
