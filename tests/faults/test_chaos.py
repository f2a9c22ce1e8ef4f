"""Every fault a worker can have, what its client sees of it, and that nothing of it stays.

Each case runs on each shard, once as a stream and once not. The faults are programmed per request and strike its first
attempts, or all of them. Whatever happens:

* the client gets one answer: nothing follows it, and no token is in it twice;
* the workers saw as many attempts as the answer says, of the same body, and never one worker twice while another one
  had not failed the request;
* afterwards no worker is charged for it, no permit is held, and no connection to a worker that hangs is open.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.answers import DONE, Answer, parse_answer, read_answer
from tests.fakes.chaos import (
    ChaosFleet,
    Cut,
    Delay,
    Drip,
    ErrorEvent,
    Fault,
    Garbage,
    How,
    Status,
    Trouble,
    chaos,
    error_json,
)
from tests.fakes.gateway import Gateway
from tests.fakes.leeway import leeway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.load import Load, Sample
from tests.fakes.permits import assert_all_are_free, assert_none_is_held, named
from tests.fakes.processes import wait_until
from tests.fakes.traffic import Client, client_of_each, completion, request

ATTEMPTS = 3
TOKENS = 8
PERMITS = 6
TOTAL_S = 2.5
PROFILE = {
    "retry": {
        "max_retries": ATTEMPTS,
        "initial_backoff_ms": 5,
        "max_backoff_ms": 1500,
        "budget_ratio": 1,
        "budget_min_per_s": 1000,
    },
    "timeouts": {"connect_s": 1, "first_token_s": 0.4, "idle_s": 0.4, "total_s": TOTAL_S},
}
SHARED = {
    "breaker": {"enabled": False},
    "admission": {"max_concurrent_requests": PERMITS, "queue_size": 0},
}
NO_PROBES = ("--health-interval-s", "3600", "--health-down-interval-s", "0.1")
"""Of healthy workers: they would meet what is meant for a request."""
FLAGS = ("--policy", "round_robin", "--pool-max-idle", "0", *NO_PROBES)
_ids = count()


class End(Enum):
    WHOLE = "whole"
    ERROR_EVENT = "error event"
    """A stream: what came so far, an error event, the end of the connection."""
    TORN = "torn"
    """The connection ends, and the framing says that something is missing."""


@dataclass(frozen=True, slots=True)
class Expected:
    status: int = 200
    attempts: int = 1
    end: End = End.WHOLE
    events: int = 0
    """Of a broken stream: so many of the worker's came through."""
    code: str | None = None
    """Of our error: in the body, or in the error event."""
    body: bytes | None = None
    """Of a worker's error: passed on as it is, without chunk framing."""
    is_final: bool = False
    """x-should-retry: false"""
    retry_after: str | None = None


WHOLE = Expected()
HIDDEN = Expected(attempts=2)


def torn(code: str, events: int) -> Expected:
    return Expected(end=End.ERROR_EVENT, events=events, code=code)


TORN = Expected(end=End.TORN)


def refused(status: int, code: str, attempts: int = ATTEMPTS) -> Expected:
    return Expected(status, attempts, code=code, is_final=True)


def passed(status: int, attempts: int = 1, *, is_final: bool = False, retry_after: str | None = None) -> Expected:
    return Expected(status, attempts, body=error_json(status), is_final=is_final, retry_after=retry_after)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    faults: Sequence[Fault | None]
    """Of the attempts, in order; the last one stays."""
    stream: Expected | None
    """None: no such fault."""
    plain: Expected | None


def once(name: str, fault: Fault, stream: Expected | None, plain: Expected | None) -> Case:
    return Case(f"{name}, once", [fault, None], stream, plain)


def always(name: str, fault: Fault, stream: Expected | None, plain: Expected | None) -> Case:
    return Case(f"{name}, always", [fault], stream, plain)


RESET, FIN, HANG = Cut(How.RESET), Cut(How.FIN), Cut(How.HANG)
BROKE = refused(502, "worker_bad_answer")

CASES = (
    Case("no fault", [None], WHOLE, WHOLE),
    once("reset after the request", RESET, HIDDEN, HIDDEN),
    always("reset after the request", RESET, BROKE, BROKE),
    once("end after the request", FIN, HIDDEN, HIDDEN),
    always("end after the request", FIN, BROKE, BROKE),
    once("garbage", Garbage(), HIDDEN, HIDDEN),
    always("garbage", Garbage(), BROKE, BROKE),
    once("hang before the head", HANG, HIDDEN, None),
    always(
        "hang before the head",
        HANG,
        refused(504, "worker_first_token_timeout"),
        # its first token is its last one: nothing but the whole request's time bounds it
        refused(504, "request_total_timeout", attempts=1),
    ),
    *(once(f"{status}", Status(status), HIDDEN, HIDDEN) for status in (408, 429, 500, 502, 503, 504)),
    *(
        always(
            f"{status}",
            Status(status),
            passed(status, ATTEMPTS, is_final=True),
            passed(status, ATTEMPTS, is_final=True),
        )
        for status in (429, 500, 503)
    ),
    Case("500, then reset", [Status(500), RESET], BROKE, BROKE),
    Case(
        "reset, then 503",
        [RESET, Status(503)],
        passed(503, ATTEMPTS, is_final=True),
        passed(503, ATTEMPTS, is_final=True),
    ),
    Case("two kinds, then well", [RESET, Status(500), None], Expected(attempts=3), Expected(attempts=3)),
    # the other worker is free at once: nobody waits
    once("429 with a long Retry-After", Status(429, "3600"), HIDDEN, HIDDEN),
    # both ask for more patience than we have: the client is told theirs
    always(
        "503 with a long Retry-After",
        Status(503, "3600"),
        passed(503, 2, retry_after="3600"),
        passed(503, 2, retry_after="3600"),
    ),
    *(always(f"{status}", Status(status), passed(status), passed(status)) for status in (400, 401, 404, 422)),
    *(always(f"{status}", Status(status), passed(status), passed(status)) for status in (501, 505)),
    once("an error as first event", ErrorEvent(503), HIDDEN, None),
    once("an error as first event, in two pieces", ErrorEvent(503, split_at=30), HIDDEN, None),
    once("an error as first event, after its chunk size", ErrorEvent(503, split_at=4), HIDDEN, None),
    always(
        "an error as first event",
        ErrorEvent(503),
        Expected(attempts=ATTEMPTS, is_final=True, body=b"".join(ErrorEvent(503).events())),
        None,
    ),
    once("reset after the head", Cut(How.RESET, after_bytes=0), HIDDEN, None),
    once("reset after the head", Cut(How.RESET, after_bytes=0), None, TORN),
    once("reset in the first event", Cut(How.RESET, after_bytes=20), HIDDEN, None),
    once("hang in the first event", Cut(How.HANG, after_bytes=20), HIDDEN, None),
    once("reset after two events", Cut(How.RESET, after_events=2), torn("worker_bad_answer", 2), None),
    once("end after two events", Cut(How.FIN, after_events=2), torn("worker_bad_answer", 2), None),
    once("reset in the third event", Cut(How.RESET, 30, after_events=2), replace(TORN, events=2), None),
    once("end in the third event", Cut(How.FIN, 30, after_events=2), replace(TORN, events=2), None),
    once("end before [DONE]", Cut(How.FIN, after_events=TOKENS), torn("worker_bad_answer", TOKENS), None),
    once("end in the body", Cut(How.FIN, after_bytes=100), None, TORN),
    once("reset in the body", Cut(How.RESET, after_bytes=100), None, TORN),
    once("hang after two events", Cut(How.HANG, after_events=2), torn("worker_idle_timeout", 2), None),
    once("hang in the body", Cut(How.HANG, after_bytes=100), None, TORN),
    once("slow drip", Drip(0.002, size=16), WHOLE, WHOLE),
)


@pytest.fixture(scope="module")
def fleet() -> Iterator[ChaosFleet]:
    with launch_engines(2) as engines, chaos([engine.url for engine in engines]) as running:
        yield running


@pytest.fixture(scope="module", params=[1, 2], ids=["1 shard", "2 shards"])
def gate(request: pytest.FixtureRequest, fleet: ChaosFleet) -> Iterator[Gateway]:
    with gateway_with(PROFILE, SHARED, *FLAGS, workers=fleet.urls, shards=request.param) as (running, _):
        yield running


@pytest.fixture(autouse=True)
def healed(fleet: ChaosFleet) -> Iterator[None]:
    yield
    fleet.heal()


@pytest.fixture(scope="module")
def whole_text(fleet: ChaosFleet) -> str:
    with Client(("127.0.0.1", fleet.workers[0].port)) as client:
        client.sock.sendall(completion(max_tokens=TOKENS))
        return read_answer(client).text


def variants() -> list[Any]:
    found = []
    for case in CASES:
        for is_stream, expected in ((True, case.stream), (False, case.plain)):
            if expected is not None:
                kind = "stream" if is_stream else "no stream"
                found.append(pytest.param(case.faults, is_stream, expected, id=f"{case.name}-{kind}"))
    return found


@pytest.mark.parametrize(("faults", "is_stream", "expected"), variants())
def test_matrix(
    gate: Gateway,
    fleet: ChaosFleet,
    whole_text: str,
    faults: Sequence[Fault | None],
    is_stream: bool,
    expected: Expected,
) -> None:
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        for client in clients.values():
            request_id = f"chaos-{next(_ids)}"
            fleet.plan(request_id, *faults[:-1], *[faults[-1]] * (ATTEMPTS + 2))
            answer = ask(client, request_id, is_stream=is_stream)
            assert_is(answer, expected, whole_text, is_stream=is_stream)
            assert_nothing_follows(client, answer)
            assert_attempts(fleet, request_id, expected.attempts)
    assert_nothing_stays(gate, fleet)


def ask(client: Client, request_id: str, *, is_stream: bool) -> Answer:
    client.sock.sendall(named(request_id, stream=is_stream, max_tokens=TOKENS))
    return read_answer(client)


def assert_is(answer: Answer, expected: Expected, whole_text: str, *, is_stream: bool) -> None:
    headers = answer.headers
    assert answer.status == expected.status, answer
    assert answer.is_whole == (expected.end is End.WHOLE), answer
    assert headers.get("x-pointsman-attempts", "1") == str(expected.attempts), answer
    assert headers.get("x-should-retry") == ("false" if expected.is_final else None), answer
    if expected.body is not None:
        assert answer.body == expected.body
        assert headers.get("retry-after") == expected.retry_after
    elif expected.status != 200:
        assert answer.error_code == expected.code
    elif expected.end is End.WHOLE:
        assert answer.text == whole_text
        assert not is_stream or answer.events[-1] == DONE
    elif is_stream:
        assert_broken_stream(answer, expected, whole_text)
    else:
        assert len(answer.body) < int(headers["content-length"])


def assert_broken_stream(answer: Answer, expected: Expected, whole_text: str) -> None:
    assert DONE not in answer.events
    events = answer.events
    if expected.end is End.ERROR_EVENT:
        last = json.loads(events.pop().removeprefix(b"data: "))
        assert last["error"]["code"] == expected.code, answer
        assert answer.body.endswith(b"\n\n"), "the event is complete"
    else:
        events = events[: expected.events]  # of the next one a piece may have come
    assert len(events) == expected.events
    pieces = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events]
    assert "".join(pieces) == whole_text[: len("".join(pieces))]
    assert len("".join(pieces)) == 4 * expected.events, "a token of the simulated engine has four letters"


def assert_nothing_follows(client: Client, answer: Answer) -> None:
    """Either the connection is over, or the next bytes on it answer the next question."""
    if answer.is_whole and answer.headers.get("connection") != "close":
        reply = client.get("/health")
        assert reply.status == 200
        assert client.rest == b""
    else:
        assert client.rest == b""
        assert client.sock.recv(1) == b""


def assert_attempts(fleet: ChaosFleet, request_id: str, expected: int) -> None:
    """As many as told, of the same body; a worker comes a second time when all have failed the request."""
    attempts = fleet.attempts_of(request_id)
    assert len(attempts) == expected
    assert len({attempt.body_sha256 for attempt in attempts}) == 1
    first = attempts[: len(fleet.workers)]
    assert len({attempt.worker for attempt in first}) == len(first)


def assert_nothing_stays(gate: Gateway, fleet: ChaosFleet) -> None:
    gate.wait_until("no load", lambda: [worker["in_flight"] for worker in gate.workers()] == [0, 0], 1)
    assert [worker["in_flight_bytes"] for worker in gate.workers()] == [0, 0]
    assert gate.in_flight() == 0
    assert_none_is_held(gate, 1)
    wait_until("the gateway has closed what hung", lambda: all(is_left(a) for a in fleet.attempts), 1)


def is_left(attempt: Any) -> bool:
    fault = attempt.fault
    return not (isinstance(fault, Cut) and fault.how is How.HANG) or attempt.closed_at < math.inf


# --- connections


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "no stream"])
def test_connections_that_are_reset_at_once(
    gate: Gateway, fleet: ChaosFleet, whole_text: str, *, is_stream: bool
) -> None:
    """The first two of three attempts, at a worker each."""
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        for client in clients.values():
            for worker in fleet.workers:
                worker.resets_accepts(1)
            answer = ask(client, "reset-at-once", is_stream=is_stream)
            assert_is(answer, Expected(attempts=3), whole_text, is_stream=is_stream)
            assert_nothing_follows(client, answer)

            for worker in fleet.workers:
                worker.resets_accepts(ATTEMPTS)
            answer = ask(client, "always-reset", is_stream=is_stream)
            assert (answer.status, answer.headers["x-pointsman-attempts"]) == (502, str(ATTEMPTS))
            assert answer.headers["x-should-retry"] == "false"
            # whether the reset comes before or after the connection counts as made is up to the kernel
            assert answer.error_code in ("worker_bad_answer", "worker_connect_failed")
            for worker in fleet.workers:
                worker.resets_accepts(0)
    assert_nothing_stays(gate, fleet)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "no stream"])
def test_a_worker_that_refuses_is_not_noticed(
    gate: Gateway, fleet: ChaosFleet, whole_text: str, *, is_stream: bool
) -> None:
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients, fleet.workers[0].refusing():
        answers = [ask(client, "refused", is_stream=is_stream) for client in clients.values() for _ in range(4)]
        for answer in answers:
            assert (answer.status, answer.text, answer.is_whole) == (200, whole_text, True)
        # whoever meets it first takes it out for all: how many are in between is up to the shards
        attempts = [int(answer.headers.get("x-pointsman-attempts", "1")) for answer in answers]
        assert attempts.count(2) >= 1
        assert set(attempts) == {1, 2}
        assert {attempt.worker for attempt in fleet.attempts} == {1}
    gate.wait_healthy(2)
    assert_nothing_stays(gate, fleet)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "no stream"])
def test_all_refuse(gate: Gateway, fleet: ChaosFleet, *, is_stream: bool) -> None:
    """A worker that refuses counts as down at once: when the last one does, there is none."""
    with ExitStack() as stack:
        clients = stack.enter_context(client_of_each(gate.pids("shard"), (gate.host, gate.port)))
        for worker in fleet.workers:
            stack.enter_context(worker.refusing())
        for client in clients.values():
            answer = ask(client, "nobody", is_stream=is_stream)
            assert answer.status in (502, 503), answer
            assert answer.error_code in ("worker_connect_failed", "no_available_workers")
            assert_nothing_follows(client, answer)
    gate.wait_healthy(2)
    assert fleet.attempts == []
    assert_nothing_stays(gate, fleet)


def test_an_unreachable_worker_costs_a_connect_timeout(gate: Gateway, fleet: ChaosFleet, whole_text: str) -> None:
    with (
        client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients,
        fleet.workers[1].unreachable(),
    ):
        for client in clients.values():
            slowest = 0.0
            for _ in range(2):  # one of two in turn goes there first
                started = time.monotonic()
                answer = ask(client, "unreachable", is_stream=False)
                slowest = max(slowest, time.monotonic() - started)
                assert (answer.status, answer.text) == (200, whole_text)
            assert 0.9 < slowest < 1 + 1 * leeway()
    gate.wait_healthy(2)
    assert_nothing_stays(gate, fleet)


# --- a sole worker


@pytest.fixture(scope="module")
def sole(fleet: ChaosFleet) -> Iterator[Gateway]:
    """Keeps its connections, and may go back to the worker that has just failed."""
    with gateway_with(PROFILE, SHARED, workers=fleet.urls[:1]) as (running, _):
        yield running


def test_a_kept_connection_that_dies_is_replaced_at_once(sole: Gateway, fleet: ChaosFleet, whole_text: str) -> None:
    """The worker's idle timeout crossed the request: sent again to the same worker, and no attempt is counted."""
    with client_of_each(sole.pids("shard"), (sole.host, sole.port)) as clients:
        for client in clients.values():
            for how in (How.RESET, How.FIN):
                assert ask(client, "makes-a-connection", is_stream=False).status == 200
                request_id = f"stale-{next(_ids)}"
                fleet.plan(request_id, Cut(how), None)
                answer = ask(client, request_id, is_stream=False)
                assert_is(answer, WHOLE, whole_text, is_stream=False)
                assert_nothing_follows(client, answer)
                assert len(fleet.attempts_of(request_id)) == 2


def test_its_retry_after_is_waited_for(sole: Gateway, fleet: ChaosFleet, whole_text: str) -> None:
    with client_of_each(sole.pids("shard"), (sole.host, sole.port)) as clients:
        for client in clients.values():
            request_id = f"patient-{next(_ids)}"
            fleet.plan(request_id, Status(503, "1"), None)
            assert_is(ask(client, request_id, is_stream=False), HIDDEN, whole_text, is_stream=False)
            first, second = fleet.attempts_of(request_id)
            assert 0.95 <= second.at - first.at <= 1 + 0.5 * leeway()


def test_its_retry_after_is_passed_on_if_it_is_too_long(sole: Gateway, fleet: ChaosFleet, whole_text: str) -> None:
    with client_of_each(sole.pids("shard"), (sole.host, sole.port)) as clients:
        for client in clients.values():
            request_id = f"impatient-{next(_ids)}"
            fleet.plan(request_id, Status(503, "60"))
            answer = ask(client, request_id, is_stream=False)
            assert_is(answer, passed(503, retry_after="60"), whole_text, is_stream=False)


def test_it_gets_the_request_again(sole: Gateway, fleet: ChaosFleet, whole_text: str) -> None:
    """There is no other one to go to."""
    with client_of_each(sole.pids("shard"), (sole.host, sole.port)) as clients:
        for client in clients.values():
            request_id = f"again-{next(_ids)}"
            fleet.plan(request_id, Status(500), Status(502), None)
            assert_is(ask(client, request_id, is_stream=True), Expected(attempts=3), whole_text, is_stream=True)
            assert {attempt.worker for attempt in fleet.attempts_of(request_id)} == {0}


# --- everything at once

STORM = 3000
PROMPTS = tuple(f"prompt {number} of the storm" for number in range(16))
FAULTS: tuple[Fault, ...] = (
    RESET,
    FIN,
    HANG,
    Garbage(),
    Status(500),
    Status(503, "0"),
    Status(429, "1"),
    ErrorEvent(503),
    Drip(0.001, size=64),
    Delay(0.02),
    Cut(How.RESET, after_events=1),
    Cut(How.FIN, after_events=3),
    Cut(How.HANG, after_events=2),
    Cut(How.RESET, 30, after_events=2),
    Cut(How.FIN, after_bytes=120),
)
STORM_PROFILE = {
    "retry": {"max_retries": 4, "initial_backoff_ms": 5},
    "timeouts": {"connect_s": 1, "first_token_s": 0.3, "idle_s": 0.3, "total_s": 2},
}
STORM_SHARED = {"admission": {"max_concurrent_requests": 24, "queue_size": 100}, "breaker": {"timeout_s": 0.2}}
CODES = {
    "worker_bad_answer",
    "worker_connect_failed",
    "worker_connect_timeout",
    "worker_first_token_timeout",
    "worker_idle_timeout",
    "request_total_timeout",
    "no_available_workers",
    "circuit_open",
}


def stormy(number: int) -> bytes:
    body = {"model": "sim-model", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": TOKENS}
    return request(body | {"stream": number % 3 != 0}, headers={"X-Request-Id": f"storm-{number}"})


def test_a_storm(whole_texts: Sequence[str]) -> None:
    """All faults at all workers, many requests at once: each client gets its own answer, or an honest error."""
    with launch_engines(4) as engines, chaos([engine.url for engine in engines]) as fleet:
        for index, worker in enumerate(fleet.workers):
            rate = 0.4 / len(FAULTS)
            worker.suffers(*(Trouble(fault, rate, seed=100 * index + n) for n, fault in enumerate(FAULTS)))
        with gateway_with(STORM_PROFILE, STORM_SHARED, workers=fleet.urls) as (gate, _):
            with Load((gate.host, gate.port), stormy, clients=40, total=STORM, keeps_answers=True) as load:
                gate.wait_until("half of it is over", lambda: len(load.samples) > STORM / 2, 60)
                with fleet.workers[0].refusing():
                    gate.wait_until("three quarters of it are over", lambda: len(load.samples) > STORM * 0.75, 60)
                samples = load.wait(60)
            assert len(samples) == STORM
            ends = Counter(honest_end(sample, whole_texts[sample.number % len(PROMPTS)]) for sample in samples)
            print(f"\n{STORM} requests, {len(fleet.attempts)} attempts: {dict(ends)}")
            assert ends["whole"] > 0.8 * STORM
            fleet.heal()
            gate.wait_until("no load", lambda: not any(worker["in_flight"] for worker in gate.workers()), 2)
            assert gate.in_flight() == 0
            assert_none_is_held(gate)


@pytest.fixture(scope="module")
def whole_texts(fleet: ChaosFleet) -> list[str]:
    with Client(("127.0.0.1", fleet.workers[0].port)) as client:
        texts = []
        for number in range(len(PROMPTS)):
            client.sock.sendall(stormy(number))
            texts.append(read_answer(client).text)
    return texts


def honest_end(sample: Sample, whole_text: str) -> str:
    """Its kind. Fails on whatever a client must never get: another one's text, half a text as a whole one, nothing."""
    answer = parse_answer(sample.answer)
    if answer.status == 429:  # of a worker, passed on when no other could take the request
        assert answer.is_whole
        return "429"
    if answer.status != 200:
        assert answer.is_whole
        code = answer.error_code
        assert code == answer.status or code in CODES, answer
        return str(code)
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert not answer.is_whole or answer.text == whole_text
        return "whole" if answer.is_whole else "torn"
    events = answer.events
    if answer.is_whole and DONE in events:
        if "error" in answer.data[0]:  # of the worker, passed on when the retries were over
            return "error event of the worker"
        assert answer.text == whole_text
        return "whole"
    assert not answer.is_whole and DONE not in events
    return broken_end(answer, whole_text)


def broken_end(answer: Answer, whole_text: str) -> str:
    events = answer.events if answer.body.endswith(b"\n\n") else answer.events[:-1]
    data = [json.loads(event.removeprefix(b"data: ")) for event in events]
    text = "".join(each["choices"][0]["text"] for each in data if "choices" in each)
    assert whole_text.startswith(text)
    if data and "error" in data[-1]:
        assert data[-1]["error"]["code"] in CODES
        return "error event"
    return "torn"


# --- permits


def test_after_all_of_it_every_permit_is_there(gate: Gateway, fleet: ChaosFleet) -> None:
    assert_all_are_free(gate, fleet, PERMITS)
    assert_nothing_stays(gate, fleet)
