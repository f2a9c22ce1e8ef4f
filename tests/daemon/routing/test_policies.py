"""The counting policies, one at a time and over random fleets."""

from collections import Counter
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.routing.policies import POLICIES, canonical, smooth_schedule

fleets = st.lists(
    st.tuples(st.integers(-1, 50), st.sampled_from([0.5, 1.0, 2.0, 3.7])), min_size=1, max_size=12
).filter(lambda fleet: any(load >= 0 for load, _ in fleet))


@pytest.mark.parametrize("name", POLICIES)
@given(fleet=fleets, seed=st.integers(0, 999))
def test_only_eligible_workers_are_picked(name: str, fleet: list[tuple[int, float]], seed: int) -> None:
    loads, weights = [load for load, _ in fleet], [weight for _, weight in fleet]
    for turn in range(3):
        assert loads[POLICIES[name](loads, weights, count(turn).__next__, Random(seed))] >= 0


def test_round_robin_goes_in_declaration_order() -> None:
    cursor = count()
    picks = [POLICIES["round_robin"]([0, -1, 9, 3], [1.0] * 4, lambda: next(cursor), Random(0)) for _ in range(6)]
    assert picks == [0, 2, 3, 0, 2, 3]


def test_weighted_round_robin_is_smooth_and_exact() -> None:
    assert smooth_schedule((5.0, 1.0, 1.0)) == (0, 0, 1, 0, 2, 0, 0)
    counts = Counter(smooth_schedule((0.7, 0.2, 0.1)))
    assert counts[0] / counts[2] == pytest.approx(7, rel=0.05)
    assert len(smooth_schedule((1000.0, 0.001))) <= 1026


def test_least_request_prefers_the_least_loaded_per_weight_and_spreads_ties() -> None:
    pick = POLICIES["least_request"]
    assert pick([3, 1, 2], [1.0, 1.0, 1.0], lambda: 0, Random(0)) == 1
    assert pick([3, 1, 2], [4.0, 1.0, 1.0], lambda: 0, Random(0)) == 0
    ties = Counter(pick([2, 2, 5], [1.0, 1.0, 1.0], lambda: 0, Random(seed)) for seed in range(400))
    assert set(ties) == {0, 1}
    assert min(ties.values()) > 120


def test_random_follows_the_weights() -> None:
    rng = Random(1)
    picks = Counter(POLICIES["random"]([0, 0, -1], [3.0, 1.0, 9.0], lambda: 0, rng) for _ in range(4000))
    assert picks[0] / picks[1] == pytest.approx(3, rel=0.2)


def test_power_of_two_never_takes_the_most_loaded_of_three() -> None:
    rng = Random(2)
    picks = {POLICIES["power_of_two"]([0, 5, 9], [1.0] * 3, lambda: 0, rng) for _ in range(200)}
    assert picks == {0, 1}


def test_names_take_dashes_and_underscores() -> None:
    assert canonical("least-request") == canonical("least_request") == "least_request"
