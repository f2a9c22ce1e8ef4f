"""Which profile `config-profile: auto` takes, as a table."""

from __future__ import annotations

import msgspec
import pytest

from pointsman.daemon.routing.auto_profile import Hints, pick_profile

PROFILES = {
    "default": {},
    "long": {"promptTokensGte": 4000},
    "longer": {"promptTokensGte": 8000},
    "middle": {"promptTokensGte": 4000, "promptTokensLt": 6000},
    "short": {"promptTokensLt": 500},
    "shorter": {"promptTokensLt": 100},
    "talkative": {"maxTokensGte": 2000},
    "terse": {"maxTokensLt": 20},
    "b-twin": {"promptTokensLt": 100},
    "aibrix-example": {"promptTokensGte": 0, "promptTokensLt": 0, "maxTokensGte": 0, "maxTokensLt": 0},
}


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "profile"),
    [
        (1000, None, None),
        (4000, None, "middle"),
        (6000, None, "long"),
        (9000, None, "longer"),
        (500, None, None),
        (499, None, "short"),
        (99, None, "b-twin"),
        (None, None, None),
        (1000, 2000, "talkative"),
        (1000, 20, None),
        (1000, 19, "terse"),
        (9000, 3000, "longer"),
        (99, 3000, "b-twin"),
    ],
)
def test_the_most_specific_profile_that_fits(
    prompt_tokens: int | None, max_tokens: int | None, profile: str | None
) -> None:
    hints = {name: msgspec.convert(given, Hints) for name, given in PROFILES.items()}
    assert pick_profile(hints, prompt_tokens, max_tokens) == profile
