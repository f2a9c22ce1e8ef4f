"""Every way in which a leg of a pair can fail: what becomes of the other one, what the client gets, who is charged."""

from __future__ import annotations

import http.client
import socket
import threading
import time

import pytest

from pointsman.daemon.telemetry import pair_counts
from tests.fakes.leeway import leeway
from tests.fakes.pair_rig import (
    BODY,
    DECODE,
    GOOD_DECODE,
    GOOD_PREFILL,
    LAST,
    LEGS,
    PLAIN,
    PREFILL,
    SSE,
    WAIT_S,
    Rig,
    Script,
    Turn,
    answer,
    answers,
    chunk,
    event,
    silent,
    streams,
    told,
    waiting,
)
from tests.fakes.scripted_worker import Session


def reset(session: Session) -> None:
    session.reset()


def refuse_status(session: Session) -> None:
    session.write(answer(500, b'{"error":{"message":"out of order"}}'))


def error_event(session: Session) -> None:
    session.write(SSE + chunk(b'data: {"error":{"message":"KVTransferError","code":500}}\n\n') + LAST)


def fail_in_turns(rig: Rig, leg: int, fault: Script, times: int, *, is_headed: bool) -> list[float]:
    """So many requests of which `leg` fails the first attempt: how long after that the sibling was cancelled, each.

    `is_headed`: the sibling has sent its head already (and, of prefill, nothing else).
    """
    sibling, latencies = 1 - leg, list[float]()
    turn = Turn()

    def failing(session: Session) -> None:
        if session.read() is not None:
            assert turn.waits.wait(WAIT_S)
            turn.struck = time.monotonic()
            fault(session)

    def decode(session: Session) -> None:
        """As an engine would: not before the prefill of its attempt, the second one of each turn, has begun."""
        while session.read() is not None:
            rig.plane.wait_until("prefill", lambda: rig.prefills() >= 2 * turn.number)
            session.write(SSE + event("good") + LAST)

    rig.workers[leg].script = failing
    rig.workers[sibling].script = waiting(turn, is_headed=is_headed)
    rig.workers[GOOD_DECODE].script = decode
    for _ in range(times):
        rig.forgive()
        turn.begin()
        status, body, headers = rig.post()
        assert (status, body) == (200, b'data: {"text": "good"}\n\n')
        assert headers["X-Pointsman-Attempts"] == "2"
        assert turn.has_closed.wait(WAIT_S)
        latencies.append(turn.closed - turn.struck)
    return latencies


@pytest.mark.parametrize("is_headed", [False, True], ids=["before the head", "after the head"])
@pytest.mark.parametrize("fault", [reset, refuse_status, error_event])
@pytest.mark.parametrize("leg", LEGS, ids=["prefill", "decode"])
def test_a_leg_that_fails_cancels_the_other_and_another_pair_answers(
    rig: Rig, leg: int, fault: Script, is_headed: bool
) -> None:
    fail_in_turns(rig, leg, fault, 5, is_headed=is_headed)
    is_own = fault is reset
    assert (rig.failures(leg) > 0) == is_own
    assert rig.failures(1 - leg) == rig.failures(GOOD_PREFILL) == rig.failures(GOOD_DECODE) == 0
    causes: dict[Script, str] = {reset: "reset", refuse_status: "status", error_event: "error_event"}
    cause = causes[fault]
    assert rig.errors() == {(pair_counts.LEGS[leg], cause): 5}


@pytest.mark.slow
@pytest.mark.parametrize("is_headed", [False, True], ids=["before the head", "after the head"])
@pytest.mark.parametrize("fault", [reset, refuse_status, error_event])
@pytest.mark.parametrize("leg", LEGS, ids=["prefill", "decode"])
def test_the_sibling_of_a_leg_that_fails_is_cancelled_within_a_tenth_of_a_second(
    rig: Rig, leg: int, fault: Script, is_headed: bool
) -> None:
    """An engine whose partner is gone would wait for minutes."""
    latencies = sorted(fail_in_turns(rig, leg, fault, 200, is_headed=is_headed))
    p50, p99 = latencies[100], latencies[198]
    print(
        f"\nsibling cancelled: p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms, at most {latencies[-1] * 1000:.2f} ms"
    )
    assert p99 <= 0.1 * leeway()


@pytest.mark.parametrize("leg", LEGS, ids=["prefill", "decode"])
def test_a_leg_that_refuses_connections(rig: Rig, leg: int) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        rig.publish(urls={leg: f"http://127.0.0.1:{unheard.getsockname()[1]}"})

        def sibling(session: Session) -> None:
            """Decode does not answer before a prefill has begun, which is that of the second attempt."""
            while session.read() is not None:
                rig.plane.wait_until("prefill", lambda: rig.prefills() >= 1)
                session.write(SSE + event("good") + LAST)

        rig.workers[1 - leg].script = sibling
        status, body, _ = rig.post()
    assert (status, body) == (200, b'data: {"text": "good"}\n\n')
    assert rig.errors() == {(pair_counts.LEGS[leg], "connect"): 1}
    assert rig.failures(1 - leg) == 0


@pytest.mark.parametrize("leg", LEGS, ids=["prefill", "decode"])
def test_a_leg_that_hangs_is_told_by_its_silence(rig: Rig, leg: int) -> None:
    """The other one gave its head, so it is the silent one that is charged."""
    rig.publish(default_timeouts={"first_token_s": 0.3})
    turns = [Turn(), Turn()]
    for slot in LEGS:
        rig.workers[slot].script = waiting(turns[slot], is_headed=slot != leg)
    status, body, _ = rig.post()
    assert (status, body) == (200, b'data: {"text": "good"}\n\n')
    assert all(turn.has_closed.wait(WAIT_S) for turn in turns)
    assert rig.errors() == {(pair_counts.LEGS[leg], "timeout"): 1}
    assert rig.failures(leg) == 1
    assert rig.failures(1 - leg) == 0


def test_two_silent_legs_are_nobodys_fault(rig: Rig) -> None:
    """A room that never matched looks like that."""
    rig.publish(default_timeouts={"first_token_s": 0.3})
    for slot in LEGS:
        rig.workers[slot].script = waiting(Turn())
    assert rig.post()[:2] == (200, b'data: {"text": "good"}\n\n')
    assert [rig.failures(slot) for slot in range(4)] == [0, 0, 0, 0]


def test_prefill_may_go_once_decode_has_begun(rig: Rig) -> None:
    begun, is_gone = threading.Event(), threading.Event()

    def prefill(session: Session) -> None:
        session.read()
        assert begun.wait(WAIT_S)
        session.reset()
        is_gone.set()

    def decode(session: Session) -> None:
        session.read()
        session.write(SSE + event("a"))
        begun.set()
        assert is_gone.wait(WAIT_S)
        session.write(event("b") + LAST)

    rig.workers[PREFILL].script, rig.workers[DECODE].script = prefill, decode
    assert rig.post()[:2] == (200, b'data: {"text": "a"}\n\ndata: {"text": "b"}\n\n')
    assert rig.failures(PREFILL) == 0


def test_a_stream_that_decode_breaks_ends_broken_and_cancels_prefill(rig: Rig) -> None:
    turn = Turn()

    def decode(session: Session) -> None:
        session.read()
        assert turn.waits.wait(WAIT_S)
        session.write(SSE + event("a"))
        session.reset()

    rig.workers[PREFILL].script = waiting(turn, is_headed=True)
    rig.workers[DECODE].script = decode
    with pytest.raises(http.client.IncompleteRead) as broken:
        rig.post()
    assert b'"error"' in broken.value.partial
    assert turn.has_closed.wait(WAIT_S)
    assert rig.failures(DECODE) == 1
    assert rig.failures(PREFILL) == 0


def test_a_stream_that_stands_still_ends_broken_and_cancels_both(rig: Rig) -> None:
    rig.publish(default_timeouts={"idle_s": 0.3})
    turns = [Turn(), Turn()]

    def decode(session: Session) -> None:
        session.read()
        assert turns[PREFILL].waits.wait(WAIT_S)
        session.write(SSE + event("a"))
        session.wait_closed()
        turns[DECODE].has_closed.set()

    rig.workers[PREFILL].script = waiting(turns[PREFILL], is_headed=True)
    rig.workers[DECODE].script = decode
    with pytest.raises(http.client.IncompleteRead) as broken:
        rig.post()
    assert b"worker_idle_timeout" in broken.value.partial
    assert all(turn.has_closed.wait(WAIT_S) for turn in turns)
    assert [rig.failures(slot) for slot in LEGS] == [0, 1]


def test_a_client_that_leaves_cancels_both(rig: Rig) -> None:
    turns = [Turn(), Turn()]
    for slot in LEGS:
        rig.workers[slot].script = waiting(turns[slot])
    with rig.plane.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY))
        assert all(turn.waits.wait(WAIT_S) for turn in turns)
    assert all(turn.has_closed.wait(WAIT_S) for turn in turns)
    assert [rig.failures(slot) for slot in LEGS] == [0, 0]


@pytest.mark.parametrize("leg", LEGS, ids=["prefill", "decode"])
def test_an_answer_that_is_not_retried_is_the_clients(rig: Rig, leg: int) -> None:
    """Whichever leg gave it; the other one is cancelled, and nobody is charged."""
    for body in (BODY, PLAIN):
        turn = Turn()

        def refuse(session: Session, turn: Turn = turn) -> None:
            session.read()
            assert turn.waits.wait(WAIT_S)
            session.write(answer(400, b'{"error":{"message":"too long"}}', b"X-Engine: 1"))

        rig.workers[leg].script = refuse
        rig.workers[1 - leg].script = waiting(turn)
        status, answered, headers = rig.post(body)
        assert (status, answered) == (400, b'{"error":{"message":"too long"}}')
        assert headers["X-Engine"] == "1"
        assert headers["X-Pointsman-Worker"] == f"worker-{leg}"
        assert turn.has_closed.wait(WAIT_S)
    assert [rig.failures(slot) for slot in range(4)] == [0, 0, 0, 0]


def test_the_last_attempts_answer_is_the_clients(rig: Rig) -> None:
    """No pair is left that could do better."""
    for slot in (PREFILL, GOOD_PREFILL):
        rig.workers[slot].script = answers(503, b'{"busy":1}')
    for slot in (DECODE, GOOD_DECODE):
        rig.workers[slot].script = silent
    rig.publish(default_retry={"max_retries": 2, "initial_backoff_ms": 1.0})
    status, body, headers = rig.post()
    assert (status, body) == (503, b'{"busy":1}')
    assert (headers["X-Pointsman-Attempts"], headers["X-Should-Retry"]) == ("2", "false")


def test_a_pair_that_fails_while_its_workers_do_well_with_others_is_left_alone(rig: Rig) -> None:
    """As SGLang's engines after a failed session; both workers go on with others."""

    def decode(session: Session) -> None:
        while (seen := session.read()) is not None:
            if told(seen)["bootstrap_port"] == 9000 + PREFILL:
                session.write(answer(500, b'{"error":"KVTransferError"}'))
            else:
                session.write(SSE + event("good") + LAST)

    rig.workers[DECODE].script = decode
    rig.publish(weight=1.0, default_pd={"prefill_policy": "random", "decode_policy": "random"})
    for _ in range(400):
        assert rig.post()[:2] == (200, b'data: {"text": "good"}\n\n')
        if pair_counts.events(rig.plane.segment)["ban"]:
            break
    before = rig.errors()
    assert pair_counts.events(rig.plane.segment)["ban"] == 1
    for _ in range(20):
        assert rig.post()[0] == 200
    assert rig.errors() == before, "nobody is sent to the banned pair"


def test_a_connection_that_had_died_is_replaced_without_an_attempt(rig: Rig) -> None:
    """Both legs begin anew, with a new room."""

    def once(session: Session) -> None:
        session.read()
        session.write(SSE + event("first") + LAST)
        session.read()  # the next request crosses our closing

    rig.workers[PREFILL].script, rig.workers[DECODE].script = once, streams("first")
    for _ in range(6):
        status, body, headers = rig.post()
        assert (status, body) == (200, b'data: {"text": "first"}\n\n')
        assert "X-Pointsman-Attempts" not in headers
    rooms = [
        told(rig.workers[DECODE].requests.get())["bootstrap_room"] for _ in range(rig.workers[DECODE].requests.qsize())
    ]
    assert len(set(rooms)) == len(rooms)
