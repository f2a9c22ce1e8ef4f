"""What a pause does to the legs of pairs: none is sent, and what prefill told grows old."""

from __future__ import annotations

import http.client
import socket
import threading

import pytest

from pointsman.daemon.shm import layout as at
from pointsman.daemon.telemetry import pair_counts
from tests.fakes.pair_rig import (
    BODY,
    DECODE,
    LEGS,
    PARAMS,
    PREFILL,
    WAIT_S,
    Rig,
    Turn,
    answer,
    waiting,
)
from tests.fakes.scripted_worker import Session


def test_vllm_parameters_older_than_the_lease_are_dropped(rig: Rig) -> None:
    """A pause keeps decode waiting; afterwards prefill runs again."""
    policies = {"prefill_policy": "least_request", "decode_policy": "least_request"}
    rig.publish(connector="nixl", default_pd={**policies, "kv_lease_s": 0.2})
    words, done = rig.plane.segment.words, list[int]()
    asked = threading.Event()

    def prefill(session: Session) -> None:
        while session.read() is not None:
            if not asked.is_set():
                words.put(at.H_PAUSE, 1)
                asked.set()
            session.write(answer(200, b'{"kv_transfer_params": %b}' % PARAMS))

    rig.workers[PREFILL].script = prefill
    asking = threading.Thread(target=lambda: done.append(rig.post()[0]))
    asking.start()
    assert asked.wait(WAIT_S)
    rig.plane.wait_until("the lease is over", lambda: pair_counts.events(rig.plane.segment)["lease_end"] == 1)
    words.put(at.H_PAUSE, 0)
    asking.join(WAIT_S)
    assert done == [200]
    assert rig.workers[PREFILL].requests.qsize() == 2
    assert rig.workers[DECODE].requests.qsize() == 1


def test_vllm_decode_is_not_sent_during_a_pause(rig: Rig) -> None:
    """Not even on a connection that is there already."""
    rig.publish(connector="nixl")
    segment, done = rig.plane.segment, list[int]()
    pauses = threading.Event()

    def prefill(session: Session) -> None:
        while session.read() is not None:
            if pauses.is_set():
                segment.words.put(at.H_PAUSE, 1)
            session.write(answer(200, b'{"kv_transfer_params": %b}' % PARAMS))

    rig.workers[PREFILL].script = prefill
    client = http.client.HTTPConnection(*rig.plane.address, timeout=WAIT_S)

    def ask() -> None:
        client.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
        found = client.getresponse()
        found.read()
        done.append(found.status)

    ask()
    pauses.set()
    asking = threading.Thread(target=ask)
    asking.start()
    rig.plane.wait_until("it waits", lambda: segment.gauge_total(at.G_HELD) == 1)
    assert rig.workers[DECODE].requests.qsize() == 1
    pauses.clear()
    segment.words.put(at.H_PAUSE, 0)
    asking.join(WAIT_S)
    client.close()
    assert done == [200, 200]
    assert rig.workers[DECODE].requests.qsize() == 2
    assert segment.gauge_total(at.G_HELD) == 0


@pytest.mark.parametrize("leg", LEGS, ids=["prefill", "decode"])
def test_a_leg_that_was_connecting_is_not_sent_during_a_pause(rig: Rig, leg: int) -> None:
    """A listener whose queue is full answers no handshake before somebody is taken from it."""
    segment, turn, done = rig.plane.segment, Turn(), list[int]()
    rig.workers[1 - leg].script = waiting(turn)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as door, socket.create_connection(door.getsockname()):
        rig.publish(urls={leg: f"http://127.0.0.1:{door.getsockname()[1]}"})
        asking = threading.Thread(target=lambda: done.append(rig.post()[0]))
        asking.start()
        assert turn.waits.wait(WAIT_S), "the other leg is sent"
        segment.words.put(at.H_PAUSE, 1)
        try:
            door.accept()[0].close()
            rig.plane.wait_until("it waits", lambda: segment.gauge_total(at.G_HELD) == 1)
            with door.accept()[0] as taken:
                taken.setblocking(False)
                with pytest.raises(BlockingIOError):
                    taken.recv(1)
                segment.words.put(at.H_PAUSE, 0)
                taken.settimeout(WAIT_S)
                assert taken.recv(1) == b"P"
                door.close()
        finally:
            segment.words.put(at.H_PAUSE, 0)
        asking.join(WAIT_S)
    assert done == [200], "another pair answered"
