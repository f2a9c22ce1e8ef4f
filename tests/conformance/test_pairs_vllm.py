"""Pairs of vLLM's: prefill first, then decode with what it told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pointsman.daemon.shm import layout as at
from pointsman.daemon.telemetry import pair_counts
from tests.fakes.data_plane import worker_spec
from tests.fakes.pair_rig import (
    BODY,
    DECODE,
    GOOD_DECODE,
    GOOD_PREFILL,
    LAST,
    LEGS,
    PARAMS,
    PREFILL,
    SSE,
    Rig,
    Script,
    answer,
    answers,
    event,
    told,
)
from tests.fakes.scripted_worker import Session


def test_vllm_prefill_first_then_decode_with_what_it_told(rig: Rig) -> None:
    rig.publish(connector="nixl")
    rig.workers[PREFILL].script = answers(200, b'{"id": "1", "kv_transfer_params": %b}' % PARAMS)
    assert rig.post()[:2] == (200, b'data: {"text": "first"}\n\n')
    prefill, decode = told(rig.workers[PREFILL].seen()), rig.workers[DECODE].seen()
    assert (prefill["stream"], prefill["max_tokens"], prefill["prompt"]) == (False, 1, "hell\u00f6")
    assert prefill["kv_transfer_params"]["do_remote_decode"] is True
    added = b',"kv_transfer_params":' + PARAMS
    assert decode.body == BODY[:-2] + added + b"}\n"


def test_vllm_mooncake_has_one_transfer_id(rig: Rig) -> None:
    rig.publish(connector="mooncake")
    rig.workers[PREFILL].script = answers(200, b'{"kv_transfer_params": {"remote_engine_id": "e1"}}')
    assert rig.post()[0] == 200
    prefill, decode = (told(rig.workers[slot].seen())["kv_transfer_params"] for slot in LEGS)
    assert prefill["transfer_id"] == decode["transfer_id"]
    assert (decode["remote_engine_id"], decode["remote_bootstrap_addr"]) == ("e1", "http://127.0.0.1:9000")


def test_vllm_several_answers_go_to_decode_alone(rig: Rig) -> None:
    rig.publish(connector="nixl")
    assert rig.post(b'{"prompt":"a","n":2,"stream":true}')[0] == 200
    seen = [rig.workers[slot].requests.qsize() for slot in range(4)]
    assert sum(seen) == seen[DECODE] + seen[GOOD_DECODE] == 1


@pytest.mark.parametrize(
    ("prefill", "cause"), [(answers(200, b"{}"), "status"), (answers(500, b"{}"), "status")], ids=["no params", "500"]
)
def test_vllm_a_prefill_that_fails(rig: Rig, prefill: Script, cause: str) -> None:
    rig.publish(connector="nixl")
    rig.workers[PREFILL].script = prefill
    rig.workers[GOOD_PREFILL].script = answers(200, b'{"kv_transfer_params": %b}' % PARAMS)
    status, body, _ = rig.post()
    assert status == 200
    assert body in (b'data: {"text": "good"}\n\n', b'data: {"text": "first"}\n\n')
    assert ("prefill", cause) in rig.errors() or ("prefill", "no_params") in rig.errors()
    assert rig.failures(PREFILL) == 1
    assert rig.failures(DECODE) == 0


def test_vllm_a_decode_that_fails_after_prefill_is_followed_by_another_full_pair(rig: Rig) -> None:
    rig.publish(connector="nixl")
    for slot in (PREFILL, GOOD_PREFILL):
        rig.workers[slot].script = answers(200, b'{"kv_transfer_params": %b}' % PARAMS)
    rig.workers[DECODE].script = answers(500, b'{"error":{"message":"Internal server error"}}')
    assert rig.post()[:2] == (200, b'data: {"text": "good"}\n\n')
    assert rig.workers[GOOD_PREFILL].requests.qsize() == 1
    assert [rig.failures(slot) for slot in range(4)] == [0, 0, 0, 0], "nobody knows yet whose fault it was"


def publish_one_and_one(rig: Rig, **fields: Any) -> None:
    """vLLM's, and nobody else."""
    specs = [
        worker_spec(slot, rig.workers[slot].url, role=("prefill", "decode")[slot], kv_connector="nixl") for slot in LEGS
    ]
    policies = {"prefill_policy": "least_request", "decode_policy": "least_request"}
    rig.plane.publish(*specs, default_pd={**policies, **fields}, default_retry={"initial_backoff_ms": 1.0})


def without_kv(session: Session) -> None:
    """A decode worker that cannot fetch anything, and serves what has nothing to fetch."""
    while (seen := session.read()) is not None:
        if b"kv_transfer_params" in seen.body:
            session.write(answer(500, b'{"error":{"message":"Internal server error"}}'))
        else:
            session.write(SSE + event("alone") + LAST)


@pytest.mark.parametrize(
    "prefill",
    [answers(200, b'{"kv_transfer_params": %b}' % PARAMS), answers(503, b"{}"), lambda session: session.reset()],
    ids=["gone between the legs", "overloaded", "reset"],
)
def test_vllm_decode_computes_the_prompt_when_the_only_prefill_worker_has_failed(rig: Rig, prefill: Script) -> None:
    publish_one_and_one(rig)
    rig.workers[PREFILL].script, rig.workers[DECODE].script = prefill, without_kv
    status, body, headers = rig.post()
    assert (status, body) == (200, b'data: {"text": "alone"}\n\n')
    assert headers["X-Pointsman-Attempts"] == "2"
    assert "X-Pointsman-Prefill-Worker" not in headers
    assert pair_counts.events(rig.plane.segment)["decode_alone"] == 1
    sent = [rig.workers[DECODE].seen() for _ in range(rig.workers[DECODE].requests.qsize())]
    assert sent[-1].body == BODY, "the client's own bytes"


@pytest.mark.parametrize("body", [BODY, b'{"prompt":"a","n":2}'], ids=["one answer", "several"])
def test_vllm_decode_computes_the_prompt_when_no_prefill_worker_is_up(rig: Rig, body: bytes) -> None:

    def decode(session: Session) -> None:
        while (seen := session.read()) is not None:
            session.write(SSE + event("fetched" if b"kv_transfer_params" in seen.body else "alone") + LAST)

    publish_one_and_one(rig)
    rig.workers[PREFILL].script = answers(200, b'{"kv_transfer_params": %b}' % PARAMS)
    rig.workers[DECODE].script = decode
    rig.plane.segment.set_status(PREFILL, at.STATUS_DOWN)
    assert rig.post(body)[:2] == (200, b'data: {"text": "alone"}\n\n')
    rig.plane.segment.set_status(PREFILL, at.STATUS_UP)
    assert rig.post()[:2] == (200, b'data: {"text": "fetched"}\n\n'), "it is back"


def test_vllm_decode_never_prefills_where_the_profile_forbids_it(rig: Rig) -> None:
    publish_one_and_one(rig, decode_without_prefill=False)
    rig.plane.segment.set_status(PREFILL, at.STATUS_DOWN)
    status, body, _ = rig.post()
    assert (status, json.loads(body)["error"]["code"]) == (503, "no_available_workers")
    assert rig.workers[DECODE].requests.empty()
