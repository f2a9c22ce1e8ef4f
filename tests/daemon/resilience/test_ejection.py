"""How many workers breakers may keep out, and who stays in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.resilience.ejection import Candidate, most_kept_out, overruled

IN = Candidate(is_kept_out=False)


def out(failure_share: float = 1.0, since: float = 0.0) -> Candidate:
    return Candidate(True, failure_share, since)


@pytest.mark.parametrize(
    ("count", "role", "ratio", "most"),
    [
        (1, "regular", 0.5, 1),  # a sole worker's breaker does open
        (1, "regular", 0.0, 1),
        (2, "regular", 0.5, 1),
        (3, "regular", 0.5, 1),
        (4, "regular", 0.5, 2),
        (4, "regular", 1.0, 4),
        (4, "regular", 0.0, 0),
        (10, "regular", 0.7, 7),
        (1, "prefill", 1.0, 0),  # the last of a role is never ejected
        (1, "decode", 0.5, 0),
        (2, "prefill", 1.0, 1),
        (4, "decode", 0.5, 2),
        (0, "regular", 0.5, 0),
        (0, "decode", 0.5, 0),
    ],
)
def test_how_many_may_be_kept_out(count: int, role: str, ratio: float, most: int) -> None:
    assert most_kept_out(count, role, ratio) == most


def test_within_the_ratio_nobody_is_overruled() -> None:
    assert overruled([out(), IN], "regular", 0.5) == frozenset()
    assert overruled([out()], "regular", 0.5) == frozenset()


def test_the_least_bad_stay() -> None:
    assert overruled([out(0.9), out(0.4), out(0.8), out(0.6)], "regular", 0.5) == {1, 3}
    assert overruled([out(0.9), IN, out(0.4), out(0.4)], "regular", 0.5) == {2}


def test_of_equals_the_one_that_opened_first_stays() -> None:
    assert overruled([out(since=30.0), out(since=10.0)], "regular", 0.5) == {1}


def test_the_last_decode_worker_stays() -> None:
    assert overruled([out()], "decode", 1.0) == {0}


candidates = st.lists(st.builds(Candidate, st.booleans(), st.floats(0, 1), st.floats(0, 1e6)), max_size=20)


@given(candidates=candidates, role=st.sampled_from(["regular", "prefill", "decode"]), ratio=st.floats(0, 1))
def test_no_more_are_kept_out_than_allowed_and_nobody_is_overruled_for_nothing(
    candidates: list[Candidate], role: str, ratio: float
) -> None:
    chosen = overruled(candidates, role, ratio)
    kept_out = {i for i, candidate in enumerate(candidates) if candidate.is_kept_out}
    most = most_kept_out(len(candidates), role, ratio)
    assert chosen <= kept_out
    assert len(kept_out - chosen) == min(len(kept_out), most)
    if chosen and kept_out - chosen:
        assert max(candidates[i].failure_share for i in chosen) <= min(
            candidates[i].failure_share for i in kept_out - chosen
        )
    if role != "regular" and candidates:
        assert len(kept_out - chosen) < len(candidates)
