"""`GET /health_generate` in a fleet of pairs: one token through a prefill and a decode worker, whatever they speak."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pointsman.daemon.shm import layout as at
from tests.fakes.data_plane import data_plane, worker_spec
from tests.fakes.pair_rig import (
    COMBINED,
    DECODE,
    GOOD_DECODE,
    GOOD_PREFILL,
    PARAMS,
    PLAIN,
    PREFILL,
    WAIT_S,
    Rig,
    answer,
    answers,
    publish_with_combined,
    told,
)
from tests.fakes.scripted_worker import ScriptedWorker, Session

PATH = "/health_generate"
ONE_TOKEN = b'{"choices":[{"text":"a"}]}'


def probe(rig: Rig, method: str = "GET", body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*rig.plane.address, timeout=10)
    try:
        connection.request(method, PATH, body, {"Content-Type": "text/plain", "X-Trace": "t"})
        found = connection.getresponse()
        return found.status, json.loads(found.read())
    finally:
        connection.close()


def test_a_pair_is_asked_for_one_token(rig: Rig) -> None:
    rig.workers[PREFILL].script = rig.workers[DECODE].script = answers(200, ONE_TOKEN)
    assert probe(rig, body=b"what nobody reads") == (200, json.loads(ONE_TOKEN))
    sent = [rig.workers[slot].seen() for slot in (PREFILL, DECODE)]
    assert sent[0].body == sent[1].body
    for seen in sent:
        assert seen.line == b"POST /v1/completions HTTP/1.1"
        assert seen.header(b"content-type") == b"application/json"
        assert seen.header(b"x-trace") == b"t"
        assert told(seen)["max_tokens"] == 1
        assert told(seen)["bootstrap_port"] == 9000


def test_a_pair_of_vllm_is_asked_even_for_a_short_prompt(rig: Rig) -> None:
    """Short prompts go to decode alone otherwise, which says nothing of the transfer."""
    pd = {"prefill_policy": "least_request", "decode_policy": "least_request", "min_uncached_tokens": 1000}
    rig.publish(connector="nixl", default_pd=pd)
    rig.workers[PREFILL].script = answers(200, b'{"kv_transfer_params": %b}' % PARAMS)
    rig.workers[DECODE].script = answers(200, ONE_TOKEN)
    assert probe(rig)[0] == 200
    assert told(rig.workers[PREFILL].seen())["kv_transfer_params"]["do_remote_decode"] is True
    assert told(rig.workers[DECODE].seen())["kv_transfer_params"] == json.loads(PARAMS)


def test_another_pair_is_asked_when_one_fails(rig: Rig) -> None:
    rig.workers[DECODE].script = answers(500, b'{"error":{"message":"KVTransferError"}}')
    rig.workers[GOOD_DECODE].script = answers(200, ONE_TOKEN)
    assert probe(rig) == (200, json.loads(ONE_TOKEN))
    rig.plane.wait_until("the other prefill", lambda: rig.workers[GOOD_PREFILL].requests.qsize() == 1)


def test_a_fleet_in_which_no_pair_works_is_told_so(rig: Rig) -> None:
    """A combined worker would answer any request, but no prefill and no decode worker does."""
    with ScriptedWorker(answers(200, ONE_TOKEN)) as combined:
        publish_with_combined(rig, combined.url)
        for slot in (DECODE, GOOD_DECODE):
            rig.plane.segment.set_status(slot, at.STATUS_DOWN)
        status, told_why = probe(rig)
        assert (status, told_why["error"]["code"]) == (503, "no_available_workers")
        assert combined.requests.qsize() == 0


def test_decode_workers_that_get_along_without_prefill_are_no_pair(rig: Rig) -> None:
    rig.publish(connector="nixl")
    rig.workers[DECODE].script = rig.workers[GOOD_DECODE].script = answers(200, ONE_TOKEN)
    for slot in (PREFILL, GOOD_PREFILL):
        rig.plane.segment.set_status(slot, at.STATUS_DOWN)
    assert rig.post(PLAIN)[0] == 200
    assert probe(rig)[0] == 503


def test_the_model_is_one_that_pairs_serve(rig: Rig) -> None:
    """Beside a regular worker of the same model, too, which is asked by all that name no profile of pairs."""
    rig.workers[PREFILL].script = rig.workers[DECODE].script = answers(200, ONE_TOKEN)
    rig.workers[GOOD_PREFILL].script = rig.workers[GOOD_DECODE].script = answers(200, ONE_TOKEN)
    with ScriptedWorker(answers(200, ONE_TOKEN)) as regular:
        publish_with_combined(rig, regular.url)
        assert probe(rig)[0] == 200
        assert regular.requests.qsize() == 0
        seen = next(worker.seen() for worker in rig.workers[DECODE:COMBINED:2] if worker.requests.qsize())
        assert told(seen)["model"] == "m"


def test_it_needs_no_place_in_the_queue(rig: Rig) -> None:
    """A fleet that is busy is not a fleet that is broken."""
    may_end = threading.Event()

    def script(session: Session) -> None:
        while (seen := session.read()) is not None:
            assert "hello" not in told(seen)["prompt"] or may_end.wait(WAIT_S)
            session.write(answer(200, ONE_TOKEN))

    for worker in rig.workers:
        worker.script = script
    with data_plane(max_concurrent_requests=1, queue_size=0) as plane:
        full = Rig(plane, rig.workers)
        full.publish()
        asking = threading.Thread(target=lambda: full.post(PLAIN))
        asking.start()
        plane.wait_until("it is at a worker", lambda: not full.is_idle())
        assert full.post(PLAIN)[0] == 429
        assert probe(full)[0] == 200
        may_end.set()
        asking.join(WAIT_S)
        plane.wait_until("no load, no hold", full.is_idle)


def test_only_get(rig: Rig) -> None:
    assert probe(rig, "POST", b"{}")[0] == 405


@pytest.fixture
def regular() -> Iterator[ScriptedWorker]:
    with ScriptedWorker(answers(200, b'{"own":1}')) as worker:
        yield worker


def test_a_fleet_without_pairs_passes_it_on(rig: Rig, regular: ScriptedWorker) -> None:
    rig.plane.publish(worker_spec(0, regular.url))
    assert probe(rig) == (200, {"own": 1})
    assert regular.seen().line == b"GET /health_generate HTTP/1.1"
