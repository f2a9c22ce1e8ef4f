"""Who takes a request that pairs cannot take, or need not."""

from __future__ import annotations

import json

import pytest

from pointsman.config.snapshot import Profile
from pointsman.daemon.shm import layout as at
from pointsman.daemon.telemetry import pair_counts
from tests.fakes.data_plane import worker_spec
from tests.fakes.pair_rig import (
    DECODE,
    GOOD_DECODE,
    LEGS,
    Rig,
    answers,
    publish_with_combined,
)
from tests.fakes.scripted_worker import ScriptedWorker


def test_a_prompt_that_no_pair_takes_goes_to_a_combined_worker(rig: Rig) -> None:
    long = json.dumps({"model": "m", "prompt": "word " * 200}).encode()
    with ScriptedWorker(answers(200, b'{"combined":1}')) as combined:
        profile = Profile("p", "pd")
        publish_with_combined(rig, combined.url, profiles={"p": profile}, default_profile="p")
        assert rig.post(long)[:2] == (200, b'{"combined":1}')
        assert rig.post()[1] != b'{"combined":1}', "a short one goes to a pair"
        assert rig.post(b'{"model":"m","input":"a"}', "/v1/responses")[:2] == (200, b'{"combined":1}')
        rig.plane.segment.set_status(DECODE, at.STATUS_DOWN)
        rig.plane.segment.set_status(GOOD_DECODE, at.STATUS_DOWN)
        assert rig.post()[:2] == (200, b'{"combined":1}'), "a side is down"
        assert pair_counts.events(rig.plane.segment)["combined"] == 2


def test_regular_workers_keep_their_requests_unless_the_profile_says_pd(rig: Rig) -> None:
    with ScriptedWorker(answers(200, b'{"regular":1}')) as regular:
        publish_with_combined(rig, regular.url)
        assert rig.post()[:2] == (200, b'{"regular":1}')


def test_a_prompt_too_long_for_all_is_told_so(rig: Rig) -> None:
    specs = [
        worker_spec(slot, rig.workers[slot].url, role=("prefill", "decode")[slot], prompt_tokens_max=10)
        for slot in LEGS
    ]
    rig.plane.publish(*specs)
    status, body, _ = rig.post(json.dumps({"prompt": "word " * 200}).encode())
    assert status == 503
    assert "a prompt of" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("connector", ["sglang", "nixl"])
def test_workers_of_other_groups_are_not_paired(rig: Rig, connector: str) -> None:
    """Nor does decode serve alone: its partners are not down, it has none."""
    specs = [
        worker_spec(
            slot,
            rig.workers[slot].url,
            role=("prefill", "decode")[slot],
            labels={"pd_group": str(slot)},
            kv_connector=connector,
        )
        for slot in LEGS
    ]
    rig.plane.publish(*specs)
    status, body, _ = rig.post()
    assert (status, json.loads(body)["error"]["code"]) == (503, "no_available_workers")


def test_vllm_a_short_rest_of_a_prompt_goes_to_decode_alone(rig: Rig) -> None:
    policies = {"prefill_policy": "least_request", "decode_policy": "least_request"}
    rig.publish(connector="nixl", default_pd={**policies, "min_uncached_tokens": 50})
    assert rig.post()[0] == 200
    assert rig.prefills() == 0
    assert pair_counts.events(rig.plane.segment)["decode_alone"] == 1
