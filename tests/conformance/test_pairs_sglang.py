"""What the two legs of a pair of SGLang's are sent: the client's own bytes, and three members."""

from __future__ import annotations

import json

from pointsman.daemon.shm import layout as at
from tests.fakes.data_plane import worker_spec
from tests.fakes.pair_rig import (
    BODY,
    DECODE,
    GOOD_PREFILL,
    LEGS,
    PREFILL,
    Rig,
    answers,
    told,
)


def test_both_legs_get_the_clients_bytes_and_three_members(rig: Rig) -> None:
    status, body, headers = rig.post()
    assert (status, body) == (200, b'data: {"text": "first"}\n\n')
    assert headers["X-Pointsman-Worker"] == "worker-1"
    assert headers["X-Pointsman-Prefill-Worker"] == "worker-0"
    sent = [rig.workers[slot].seen() for slot in LEGS]
    assert sent[0].body == sent[1].body
    room = told(sent[0])["bootstrap_room"]
    added = b',"bootstrap_host":"127.0.0.1","bootstrap_port":9000,"bootstrap_room":%d' % room
    assert sent[0].body.replace(added, b"", 1) == BODY
    assert len(sent[0].body) == len(BODY) + len(added)
    assert sent[0].header(b"x-request-id") == sent[1].header(b"x-request-id")


def test_a_batch_has_a_room_for_each_sequence(rig: Rig) -> None:
    rig.post(b'{"text": ["a", "b"], "sampling_params": {"n": 2}}', "/generate")
    sent = told(rig.workers[PREFILL].seen())
    assert sent["bootstrap_host"] == ["127.0.0.1"] * 4
    assert sent["bootstrap_port"] == [9000] * 4
    assert len(set(sent["bootstrap_room"])) == 4
    assert told(rig.workers[DECODE].seen()) == sent


def test_no_bootstrap_port_is_null(rig: Rig) -> None:
    specs = [worker_spec(slot, rig.workers[slot].url, role=("prefill", "decode")[slot]) for slot in LEGS]
    rig.plane.publish(*specs)
    assert rig.post()[0] == 200
    assert b'"bootstrap_port":null' in rig.workers[DECODE].seen().body


def test_a_client_cannot_name_the_host(rig: Rig) -> None:
    status, body, _ = rig.post(b'{"prompt":"a","bootstrap_host":"10.0.0.9"}')
    assert (status, json.loads(body)["error"]["code"]) == (400, "reserved_member")


def test_rooms_never_come_twice(rig: Rig) -> None:
    rooms = set()
    for _ in range(50):
        assert rig.post()[0] == 200
        rooms.add(told(rig.workers[DECODE].seen())["bootstrap_room"])
    assert len(rooms) == 50


def test_what_is_no_generation_goes_to_a_prefill_worker(rig: Rig) -> None:
    rig.workers[PREFILL].script = rig.workers[GOOD_PREFILL].script = answers(200, b'{"tokens":[1]}')
    assert rig.post(b'{"prompt":"a"}', "/tokenize")[1] == b'{"tokens":[1]}'
    status, body, _ = rig.post(b'{"input":"a"}', "/v1/responses")
    assert (status, json.loads(body)["error"]["code"]) == (400, "not_for_pairs")


def test_sglang_decode_cannot_prefill(rig: Rig) -> None:
    for slot in (PREFILL, GOOD_PREFILL):
        rig.plane.segment.set_status(slot, at.STATUS_DOWN)
    status, body, _ = rig.post()
    assert (status, json.loads(body)["error"]["code"]) == (503, "no_available_workers")
