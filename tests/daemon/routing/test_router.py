"""The library interface, the default policy term by term, cache_aware's branches, keys and filters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing import Decision, Request, Router, Worker
from pointsman.daemon.routing.cost_model import CostModel, Smoothed
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN


def prompt(*blocks: int, tokens: int | None = None, **more: Any) -> Request:
    return Request(blocks=blocks, block_tokens=100, prompt_tokens=tokens or 100 * len(blocks), **more)


def fleet(count: int, kv_tokens: int | None = 10_000) -> list[Worker]:
    return [Worker(f"w{number}", kv_tokens) for number in range(count)]


def charge(router: Router, worker: int, request: Request, now: float = 0.0) -> Decision:
    return router.choose(request, now, eligible=[worker])


def test_the_life_of_a_request() -> None:
    router = Router(fleet(2))
    decision = router.choose(prompt(1, 2, 3), 0.0)
    load = router.fleet.loads[decision.index]
    assert (load.in_flight, load.decoding, load.queued_tokens, load.tokens) == (1, 0, 300, 300)
    assert decision.predicted_ttft_s == pytest.approx(router.fleet.cost.seconds(300, 0))
    router.first_token(decision, 0.5)
    assert (load.in_flight, load.decoding, load.queued_tokens, load.wait_s(0.5)) == (1, 1, 0, 0.0)
    router.finish(decision, 1.0, 10)
    assert (load.in_flight, load.decoding, load.tokens, load.reserved_chars) == (0, 0, 0, 0)
    again = router.choose(prompt(1, 2, 3, 4), 2.0)
    assert (again.worker, again.matched_tokens, again.reason) == (decision.worker, 300, "prefix")


def test_ends_in_any_order_and_twice() -> None:
    router = Router(fleet(1))
    unseen, failed = router.choose(prompt(1), 0.0), router.choose(prompt(2), 0.0)
    router.finish(unseen, 1.0, 5)
    router.first_token(unseen, 1.1)
    router.finish(unseen, 1.2, 5)
    router.finish(failed, 1.0, None)
    load = router.fleet.loads[0]
    assert (load.in_flight, load.decoding, load.queued_tokens, len(load.pending)) == (0, 0, 0, 0)
    assert router.fleet.index.pinned(0) == 0


lives = st.lists(
    st.tuples(st.sampled_from(["choose", "first", "finish", "fail", "forget"]), st.integers(0, 5), st.floats(0, 2)),
    max_size=60,
)


@given(lives=lives, policy=st.sampled_from(["expected_cost", "cache_aware", "lmetric", "prefix-cache,throughput"]))
def test_counts_never_get_negative_and_end_at_zero(lives: list[tuple[str, int, float]], policy: str) -> None:
    router = Router(fleet(3, 500), {"strategy": policy, "sticky": {}})
    open_: list[Decision] = []
    now = 0.0
    for what, number, step in lives:
        now += step
        if what == "choose":
            headers = {"x-session-id": str(number % 2), "user": str(number)}
            open_.append(router.choose(prompt(*range(number // 2, number + 2), headers=headers), now))
        elif what == "forget":
            router.fleet.forget(number % 3)
        elif number < len(open_):
            if what == "first":
                router.first_token(open_[number], now)
            else:
                router.finish(open_.pop(number), now, 20 if what == "finish" else None)
        for worker, load in enumerate(router.fleet.loads):
            assert min(load.in_flight, load.decoding, load.queued_tokens, load.tokens, load.reserved_chars) >= 0
            assert load.wait_s(now) >= 0
            assert router.fleet.index.pinned(worker) >= 0
    for decision in open_:
        router.finish(decision, now, 1)
    for worker, load in enumerate(router.fleet.loads):
        assert (load.in_flight, load.decoding, load.queued_tokens, load.tokens, load.wait_s(now)) == (0, 0, 0, 0, 0.0)
        assert (load.reserved_chars, router.fleet.index.pinned(worker)) == (0, 0)
        if policy != "cache_aware":
            assert router.fleet.index.size(worker) <= 500 * CHARS_PER_TOKEN


def test_the_seed_and_the_calls_determine_everything() -> None:
    def picks(seed: int) -> list[str]:
        router = Router(fleet(8), seed=seed)
        return [router.choose(prompt(number), 0.0).worker for number in range(20)]

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)


def test_expected_cost_adds_up_term_by_term() -> None:
    router = Router(fleet(2, 1000))
    first = charge(router, 0, prompt(1, 2, 3, 4, 5))
    router.first_token(first, 0.0)
    charge(router, 0, prompt(6, 7), 0.0)
    asked = prompt(1, 2, 3, 9)
    explanation = router.explain(asked, 0.001)
    wait, memory, price, prefill = (column.raw for column in explanation.columns)
    cost = router.fleet.cost
    line = cost.seconds(200, 0)
    assert wait[0] == pytest.approx(line - min(0.001, 0.95 * line))
    assert wait[1] == 0.0
    held = router.fleet.index.pinned(0) + router.fleet.loads[0].reserved_chars
    assert held == (700 + 2 * 200) * CHARS_PER_TOKEN
    over = held + (400 + router.fleet.output_mean.value) * CHARS_PER_TOKEN - 1000 * CHARS_PER_TOKEN
    assert memory[0] == pytest.approx(router.fleet.stay.value * over / held)
    assert memory[1] == 0.0
    assert price[0] == pytest.approx(0.2 * held / (1000 * CHARS_PER_TOKEN))
    theta = 1 + 0.3 + 20 * router.fleet.lost
    assert prefill[0] == pytest.approx((theta + 0.05) * cost.seconds(100, 300))
    assert prefill[1] == pytest.approx(theta * cost.seconds(400, 0))
    assert router.choose(asked, 0.001).worker == "w1"


def test_theta_grows_with_what_the_caches_lost() -> None:
    router = Router(fleet(1, 250))
    for turn in range(40):
        decision = router.choose(prompt(turn % 4 + 1, turn % 4 + 101), float(turn))
        router.finish(decision, turn + 0.5, 1)
    assert router.fleet.lost > 0.05


def test_unknown_capacity_is_taken_as_unlimited() -> None:
    router = Router([Worker("a"), Worker("b", 1000)])
    for number in range(50):
        router.finish(charge(router, 0, prompt(number)), float(number), 1)
        router.finish(charge(router, 1, prompt(number)), float(number), 1)
    assert router.fleet.index.blocks(0) == 50
    assert router.fleet.index.blocks(1) == 9  # the expected output of the last one took room
    router.fleet.set_kv_tokens(0, 500)
    assert router.fleet.index.blocks(0) == 5


@pytest.mark.parametrize("start", [1e-6, 1e-3])
def test_the_cost_model_learns_from_a_wrong_start(start: float) -> None:
    model = CostModel(token_s=start, pair_s=0.0)
    for number in range(400):
        new, context = 50 + number * 37 % 8000, number * 101 % 30_000
        model.learn(new, context, model.base_s + 30e-6 * new + 1.2e-9 * new * (context + new / 2))
    assert model.token_s == pytest.approx(30e-6, rel=0.05)
    assert model.pair_s == pytest.approx(1.2e-9, rel=0.05)
    for bad in (float("nan"), float("inf"), -1.0):
        model.learn(100, 0, bad)
    assert model.token_s == pytest.approx(30e-6, rel=0.05)


def test_smoothed_is_a_mean_at_first() -> None:
    value = Smoothed(10.0)
    value.add(20.0)
    assert value.value == 15.0


SEED = {"strategy": "cache_aware", "cache_aware": {"miss": "smallest_tree", "holder": "first"}}


def test_cache_aware_as_published_goes_to_the_first_holder_and_the_smallest_tree() -> None:
    router = Router(fleet(3), SEED)
    charge(router, 2, prompt(1, 2))
    charge(router, 1, prompt(1, 2, 3))
    charge(router, 0, prompt(7, 8))
    assert router.choose(prompt(1, 2), 0.0).index == 1
    router.fleet.index.insert(0, prompt(20).chain())
    assert router.choose(prompt(30), 0.0).index == 2


def test_cache_aware_by_default_goes_to_the_least_loaded_in_both_cases() -> None:
    router = Router(fleet(3), "cache_aware")
    charge(router, 1, prompt(1, 2))
    charge(router, 1, prompt(9))
    charge(router, 2, prompt(1, 2))
    assert router.choose(prompt(1, 2), 0.0).worker == "w2"
    assert router.choose(prompt(30), 0.0).worker == "w0"


def test_cache_aware_needs_more_than_the_threshold() -> None:
    router = Router(fleet(2), {"strategy": "cache_aware", "cache_aware": {"cache_threshold": 0.5}})
    charge(router, 1, prompt(1, 2))
    assert router.choose(prompt(1, 2, 3, 4), 0.0).reason == "load"
    router = Router(fleet(2), {"strategy": "cache_aware", "cache_aware": {"cache_threshold": 0.49}})
    charge(router, 1, prompt(1, 2))
    assert router.choose(prompt(1, 2, 3, 4), 0.0).worker == "w1"


def test_cache_aware_leaves_affinity_when_imbalanced_and_still_inserts() -> None:
    parameters = {"balance_abs_threshold": 2, "balance_rel_threshold": 1.5}
    router = Router(fleet(3), {"strategy": "cache_aware", "cache_aware": parameters})
    for _ in range(4):
        charge(router, 0, prompt(1, 2))
    charge(router, 1, prompt(5))
    decision = router.choose(prompt(1, 2), 0.0)
    assert (decision.worker, decision.reason) == ("w2", "imbalance")
    assert router.explain(prompt(1, 2), 0.0).columns[1].raw[2] == 1.0
    # Loads of workers that are not eligible do not count.
    assert router.choose(prompt(5), 0.0, eligible=[1, 2]).reason == "prefix"


def test_cache_aware_cuts_its_trees_at_intervals() -> None:
    parameters = {"eviction_interval_secs": 10, "max_tree_size": 100 * CHARS_PER_TOKEN}
    router = Router(fleet(1), {"strategy": "cache_aware", "cache_aware": parameters})
    for now, size in ((0.0, 3), (9.0, 4), (11.0, 2)):
        router.choose(prompt(*range(int(now) * 10 + 1, int(now) * 10 + (4 if now == 0 else 2))), now)
        assert router.fleet.index.blocks(0) == size


def test_sessions_stay_while_that_is_not_much_dearer() -> None:
    router = Router(fleet(2, None), {"strategy": "least_request", "sticky": {"factor": 2.0}})
    headers = {"x-session-id": "s"}
    first = charge(router, 1, prompt(1, tokens=100, headers=headers))
    router.finish(first, 0.1, 1)
    assert router.choose(prompt(1, headers=headers), 0.2).reason == "sticky"
    for number in range(20):
        charge(router, 1, prompt(*range(number * 20, number * 20 + 20)), 0.3)
    assert router.choose(prompt(1, headers=headers), 0.4).worker == "w0"
    assert router.choose(prompt(1, headers=headers), 0.5).reason == "sticky"
    assert router.choose(prompt(1, headers=headers), 9999.0).reason != "sticky"


@pytest.mark.parametrize("policy", ["consistent_hash", "prefix_hash"])
def test_keys_stay_put_spill_when_hot_and_move_little(policy: str) -> None:
    router = Router(fleet(8), policy)

    def ask(number: int, eligible: list[int] | None = None) -> Decision:
        request = prompt(number, headers={"x-smg-routing-key": str(number)})
        decision = router.choose(request, 0.0, eligible=eligible)
        router.finish(decision, 0.0, 1)
        return decision

    homes = {number: ask(number).index for number in range(64)}
    assert len(set(homes.values())) == 8
    left = [worker for worker in range(8) if worker != homes[0]]
    for number, home in homes.items():
        moved = ask(number, left).index
        assert moved == home if home != homes[0] else moved in left
    picks = [router.choose(prompt(5, headers={"x-smg-routing-key": "5"}), 0.0) for _ in range(40)]
    assert {decision.reason for decision in picks} >= {"spill"}
    assert max(load.in_flight for load in router.fleet.loads) <= 8


def test_target_worker_and_label_filter() -> None:
    workers = [Worker("a", labels={"gpu": "h100"}), Worker("b", labels={"gpu": "a100", "zone": "x"}), Worker("c")]
    router = Router(workers)

    def chosen(**headers: str) -> str:
        return router.choose(Request(headers={k.replace("_", "-"): v for k, v in headers.items()}), 0.0).worker

    assert chosen(x_smg_target_worker="2") == "c"
    assert chosen(external_filter="gpu=h100") == "a"
    assert chosen(external_filter="gpu, zone==x") == "b"
    assert chosen(external_filter="!gpu") == "c"
    assert chosen(external_filter="gpu!=h100,zone") == "b"
    for bad, status in (("gpu=none", 503), ("=x", 400), (",", 400)):
        with pytest.raises(RequestError) as caught:
            chosen(external_filter=bad)
        assert caught.value.status == status
    with pytest.raises(RequestError, match="no worker is eligible"):
        chosen(x_smg_target_worker="7")
    explanation = router.explain(Request(headers={"external-filter": "gpu=h100"}), 0.0)
    assert explanation.as_json(router.names)["dropped"] == {
        "b": "label filter: gpu=h100",
        "c": "label filter: gpu=h100",
    }


def test_prompt_length_buckets() -> None:
    router = Router([Worker("short", prompt_tokens_max=100), Worker("long", prompt_tokens_min=101)])
    assert router.choose(Request(prompt_tokens=100), 0.0).worker == "short"
    assert router.choose(Request(prompt_tokens=101), 0.0).worker == "long"
    why_not_long = router.explain(Request(prompt_tokens=100), 0.0).as_json(router.names)["dropped"]
    why_not_short = router.explain(Request(prompt_tokens=101), 0.0).as_json(router.names)["dropped"]
    assert why_not_long == {"long": "takes 101 tokens and more"}
    assert why_not_short == {"short": "takes 0 to 100 tokens"}


def test_identical_new_prompts_at_once_spread() -> None:
    router = Router(fleet(4, None))
    for _ in range(1000):
        router.choose(prompt(1, 2, 3, 4), 0.0)
    loads = [load.in_flight for load in router.fleet.loads]
    assert sum(loads) == 1000
    assert min(loads) > 0
