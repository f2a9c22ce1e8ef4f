"""Real engines: llama.cpp finds more of its prompts cached behind the default policy than behind round robin."""

from __future__ import annotations

import pytest

from pointsman.scripts.hit_rate.client import Tally
from pointsman.scripts.hit_rate.real import GROUPS, run

BOUND = 1.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_expected_cost_hits_what_round_robin_misses() -> None:
    """Two shards; streamed; the engines' own counts of tokens."""
    tallies = {policy: run(GROUPS, policy) for policy in ("round_robin", "expected_cost")}
    for policy, tally in tallies.items():
        print(f"\n{policy}: {line(tally)}")
        assert tally.requests == GROUPS.recording.requests
        assert len(tally.by_shard) == 2
        prompt_tokens = tally.prompt_tokens // tally.requests
        assert GROUPS.prompts_held(prompt_tokens) < GROUPS.recording.groups, "more than one engine can hold"
    assert len(tallies["round_robin"].by_worker) == GROUPS.workers
    assert tallies["expected_cost"].hit_rate >= BOUND * tallies["round_robin"].hit_rate


def line(tally: Tally) -> str:
    requests = sorted(tally.by_worker.values())
    return f"{tally.cached_tokens} of {tally.prompt_tokens} tokens, {tally.hit_rate:.3f}; requests by worker {requests}"
