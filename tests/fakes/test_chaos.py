"""The chaos proxy does to an answer what it was told, and says what it saw."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator

import pytest

from tests.fakes.chaos import (
    Attempt,
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
from tests.fakes.processes import wait_until
from tests.fakes.scripted_worker import ScriptedWorker, answer_all
from tests.fakes.traffic import LAST_CHUNK, Client, request

EVENTS = tuple(b"%x\r\n%b\r\n" % (len(event), event) for event in (b"data: one\n\n", b"data: two\n\n", b"data: 3\n\n"))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = HEAD + b"".join(EVENTS) + LAST_CHUNK[2:]


@pytest.fixture
def engine() -> Iterator[ScriptedWorker]:
    with ScriptedWorker(answer_all(STREAM)) as running:
        yield running


@pytest.fixture
def fleet(engine: ScriptedWorker) -> Iterator[ChaosFleet]:
    with chaos([engine.url, engine.url]) as running:
        yield running


def client_of(fleet: ChaosFleet, index: int = 0) -> Client:
    return Client(("127.0.0.1", fleet.workers[index].port))


def asked(request_id: str = "1") -> bytes:
    return request({"prompt": "x"}, headers={"X-Request-Id": request_id})


def all_of(client: Client) -> tuple[bytes, bool]:
    """What came until the connection ended, and whether it ended with a reset."""
    data = b""
    while True:
        try:
            more = client.read_more()
        except ConnectionResetError:
            return data, True
        if not more:
            return data, False
        data += more


def test_without_a_fault_everything_passes_as_it_is(fleet: ChaosFleet, engine: ScriptedWorker) -> None:
    with client_of(fleet) as client:
        for number in ("1", "2"):
            assert client.ask(asked(number)).body == STREAM[len(HEAD) :]
            seen = engine.seen()
            assert (seen.header(b"x-request-id"), seen.body) == (number.encode(), b'{"prompt": "x"}')
    digest = hashlib.sha256(b'{"prompt": "x"}').hexdigest()
    assert [(a.worker, a.request_id, a.path, a.body_sha256, a.fault) for a in fleet.attempts] == [
        (0, number, "/v1/completions", digest, None) for number in ("1", "2")
    ]
    assert engine.connections == 1


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        (Cut(How.RESET), b""),
        (Cut(How.FIN), b""),
        (Cut(How.RESET, after_bytes=0), HEAD),
        (Cut(How.RESET, after_bytes=7), HEAD + EVENTS[0][:7]),
        (Cut(How.FIN, after_bytes=20), HEAD + (EVENTS[0] + EVENTS[1])[:20]),
        (Cut(How.RESET, after_events=2), HEAD + EVENTS[0] + EVENTS[1]),
        (Cut(How.FIN, after_events=1), HEAD + EVENTS[0]),
        (Cut(How.FIN, after_events=1, after_bytes=5), HEAD + EVENTS[0] + EVENTS[1][:5]),
    ],
)
def test_cuts(fleet: ChaosFleet, cut: Cut, left: bytes) -> None:
    fleet.plan("1", cut)
    with client_of(fleet) as client:
        client.sock.sendall(asked())
        assert all_of(client) == (left, cut.how is How.RESET)
    assert [attempt.fault for attempt in fleet.attempts] == [cut]
    assert fleet.attempts[0].closed_at == math.inf, "the worker closed it, not the gateway"


@pytest.mark.parametrize(("cut", "left"), [(Cut(How.HANG), b""), (Cut(How.HANG, after_events=1), HEAD + EVENTS[0])])
def test_who_hangs_notices_when_the_gateway_leaves(fleet: ChaosFleet, cut: Cut, left: bytes) -> None:
    fleet.plan("1", cut)
    with client_of(fleet) as client:
        client.sock.sendall(asked())
        data = b""
        while len(data) < len(left):
            data += client.read_more()
        assert data == left
        wait_until("the request is noted", lambda: bool(fleet.attempts), 5)
        (attempt,) = fleet.attempts
        before = time.monotonic()
        assert attempt.closed_at == math.inf
    wait_until("the end is noted", lambda: attempt.closed_at < math.inf, 5)
    assert before <= attempt.closed_at <= time.monotonic()


JSON_HEAD = b"HTTP/1.1 %d Chaos\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
STATUS_503 = JSON_HEAD % (503, len(error_json(503))) + b"\r\n" + error_json(503)
STATUS_429 = JSON_HEAD % (429, 2) + b"Retry-After: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("fault", "wire"),
    [(Status(503), STATUS_503), (Status(429, "2", b"{}"), STATUS_429), (Garbage(b"nonsense"), b"nonsense")],
    ids=["503", "429", "garbage"],
)
def test_answers_of_its_own(fleet: ChaosFleet, engine: ScriptedWorker, fault: Fault, wire: bytes) -> None:
    fleet.plan("1", fault)
    with client_of(fleet) as client:
        client.sock.sendall(asked())
        data = b""
        while len(data) < len(wire):
            data += client.read_more()
        assert data == wire
        assert client.ask(asked()).status == 200, "it goes on with the next request"
    assert len(engine.requests.queue) == 1


def test_an_error_as_first_event(fleet: ChaosFleet) -> None:
    fleet.plan("1", ErrorEvent(429))
    with client_of(fleet) as client:
        reply = client.ask(asked())
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    assert b"data: " + error_json(429) + b"\n\n\r\n" in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n\r\n" + LAST_CHUNK[2:])


def test_drip_and_delay_change_no_byte(fleet: ChaosFleet) -> None:
    fleet.plan("1", Drip(0.002), Delay(0.1))
    with client_of(fleet) as client:
        for least_s in (0.002 * len(STREAM[len(HEAD) :]) / 2, 0.1):
            started = time.monotonic()
            assert client.ask(asked()).body == STREAM[len(HEAD) :]
            assert time.monotonic() - started >= least_s


def test_a_plan_follows_its_request_over_all_workers(fleet: ChaosFleet) -> None:
    fleet.plan("1", Status(500), None)
    fleet.workers[1].suffers(Trouble(Status(503)))
    with client_of(fleet) as first, client_of(fleet, 1) as second:
        assert first.ask(asked()).status == 500
        assert second.ask(asked()).status == 200
        assert second.ask(asked()).status == 503
        assert second.ask(asked("2")).status == 503
        assert second.get("/health").status == 200, "probes are not struck"
    assert [attempt.worker for attempt in fleet.attempts_of("1")] == [0, 1, 1]
    fleet.heal()
    assert fleet.attempts == []
    with client_of(fleet, 1) as second:
        assert second.ask(asked()).status == 200


def test_a_share_of_the_requests_is_the_same_in_every_run() -> None:
    def drawn(seed: int) -> list[bool]:
        trouble = Trouble(Status(500), rate=0.3, seed=seed)
        return [trouble.strikes() for _ in range(1000)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 250 < sum(drawn(1)) < 350
    limited = Trouble(Status(500), times=2)
    assert [limited.strikes() for _ in range(4)] == [True, True, False, False]


def test_connections_that_are_reset_at_once(fleet: ChaosFleet) -> None:
    worker = fleet.workers[0]
    worker.resets_accepts(2)
    for _ in range(2):
        with pytest.raises(ConnectionResetError), client_of(fleet) as client:
            client.read_more()
    with client_of(fleet) as client:
        assert client.ask(asked()).status == 200
    assert worker.accepted == 3
    assert len(fleet.attempts) == 1


def test_a_closed_port_refuses_and_opens_again(fleet: ChaosFleet) -> None:
    with client_of(fleet) as client:
        assert client.ask(asked()).status == 200
        with fleet.workers[0].refusing():
            assert all_of(client) == (b"", True)
            with pytest.raises(ConnectionRefusedError):
                client_of(fleet)
            with client_of(fleet, 1) as other:
                assert other.ask(asked()).status == 200
    with client_of(fleet) as client:
        assert client.ask(asked()).status == 200


def test_nobody_connects_to_an_unreachable_worker(fleet: ChaosFleet) -> None:
    with client_of(fleet) as client:
        assert client.ask(asked()).status == 200
        with fleet.workers[0].unreachable():
            with pytest.raises(TimeoutError):
                Client(("127.0.0.1", fleet.workers[0].port), timeout_s=0.3)
            assert client.ask(asked()).status == 200
    with client_of(fleet) as client:
        assert client.ask(asked()).status == 200


def test_an_engine_that_is_not_there_is_a_reset() -> None:
    with ScriptedWorker() as gone:
        url = gone.url
    with chaos([url]) as fleet, client_of(fleet) as client:
        client.sock.sendall(asked())
        assert all_of(client) == (b"", True)
        attempts: list[Attempt] = fleet.attempts_of("1")
        assert len(attempts) == 1
