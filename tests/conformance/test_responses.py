"""Workers' answers: passed on as they are, ended where they end, and never made to look complete when they are not."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from pointsman.config.snapshot import Profile
from pointsman.daemon.shm import layout as at
from tests.conformance.raw_http import BODY, Reader, get, post
from tests.fakes.data_plane import DataPlane, data_plane, worker_spec
from tests.fakes.leeway import leeway
from tests.fakes.scripted_worker import OK, Script, ScriptedWorker, Session, answer_all

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_BODY = b'{"model": "m", "prompt": "hello", "stream": true}'


def event(text: str) -> bytes:
    return f'data: {{"text": "{text}"}}\n\n'.encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture
def worker() -> Iterator[ScriptedWorker]:
    with ScriptedWorker() as scripted:
        yield scripted


@pytest.fixture(scope="module")
def shared_plane() -> Iterator[DataPlane]:
    with data_plane(shards=2) as running:
        yield running


@pytest.fixture
def plane(shared_plane: DataPlane, worker: ScriptedWorker) -> Iterator[DataPlane]:
    shared_plane.publish(worker_spec(0, worker.url))
    yield shared_plane
    shared_plane.wait_until("no request in flight", lambda: shared_plane.in_flight() == 0)


@pytest.fixture
def client(plane: DataPlane) -> Iterator[Reader]:
    with plane.connect() as sock:
        yield Reader(sock)


def test_headers_pass_but_for_hop_by_hop_ones(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = answer_all(
        b"HTTP/1.1 201 Made\r\nX-Engine: 1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nKeep-Alive: timeout=5\r\n"
        b"Connection: keep-alive, X-Named\r\nX-Named: 1\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\nhi"
    )
    client.sock.sendall(post(b"/v1/completions", BODY, b"X-Request-Id: ours"))
    answer = client.answer()
    assert (answer.status, answer.body) == (201, b"hi")
    assert answer.header(b"x-engine") == b"1"
    assert [value for name, value in answer.headers if name == b"Set-Cookie"] == [b"a=1", b"b=2"]
    assert answer.header(b"x-named") is None
    assert answer.header(b"keep-alive") is None
    assert [value for name, value in answer.headers if name.lower() == b"x-request-id"] == [b"ours"]
    assert answer.header(b"x-pointsman-worker") == b"worker-0"


def test_a_stream_is_relayed_byte_for_byte_and_at_once(client: Reader, worker: ScriptedWorker) -> None:
    go = threading.Event()

    def script(session: Session) -> None:
        session.read()
        session.write(SSE + chunk(event("a")))
        assert go.wait(30), "the first event must reach the client before the second is written"
        session.write(chunk(event("b")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        session.wait_closed()

    worker.script = script
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    status, headers = client.head()
    assert status == 200
    assert (b"Transfer-Encoding", b"chunked") in headers
    while chunk(event("a")) not in client.rest:
        assert client._more()
    go.set()
    while not client.rest.endswith(b"0\r\n\r\n"):
        assert client._more()
    assert client.rest == chunk(event("a")) + chunk(event("b")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def test_a_http_1_0_client_gets_the_stream_without_chunks(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = answer_all(SSE + chunk(event("a")) + chunk(event("b")) + b"0\r\n\r\n")
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY, version=b"1.0"))
    answer = client.answer()
    assert answer.header(b"transfer-encoding") is None
    assert answer.body == event("a") + event("b")


def test_an_answer_without_a_length_ends_with_its_connection(client: Reader, worker: ScriptedWorker) -> None:
    def script(session: Session) -> None:
        session.read()
        session.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello ")
        session.write(b"world")

    worker.script = script
    client.sock.sendall(post())
    answer = client.answer()
    assert answer.header(b"connection") == b"close"
    assert answer.body == b"hello world"


@pytest.mark.parametrize("status", [204, 304])
def test_answers_that_have_no_body_keep_the_connection_in_step(
    status: int, client: Reader, worker: ScriptedWorker
) -> None:
    worker.script = answer_all(b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status)
    client.sock.sendall(post() + get(b"/health"))
    assert client.answer().status == status
    assert client.answer().body == b"OK"


def test_interim_answers_pass_and_100_is_ours(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = answer_all(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK)
    client.sock.sendall(post())
    assert client.head()[0] == 103
    assert client.head()[0] == 200


def test_head_requests_of_information(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = answer_all(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    client.sock.sendall(get(b"/version", method=b"HEAD") + get(b"/health"))
    assert client.answer(b"HEAD").header(b"content-length") == b"500"
    assert client.answer().body == b"OK"


def test_errors_of_a_worker_pass_unchanged(client: Reader, worker: ScriptedWorker) -> None:
    body = b'{"error": {"message": "too long", "type": "BadRequestError"}}'
    worker.script = answer_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    client.sock.sendall(post())
    answer = client.answer()
    assert (answer.status, answer.body) == (400, body)


# --- broken answers


def cut_after(*parts: bytes, reset: bool = False) -> Script:
    def script(session: Session) -> None:
        session.read()
        for part in parts:
            session.write(part)
        if reset:
            session.reset()

    return script


def silent_after(*parts: bytes) -> Script:
    def script(session: Session) -> None:
        session.read()
        for part in parts:
            session.write(part)
        session.wait_closed()

    return script


@pytest.mark.parametrize(
    ("sent", "closing"),
    [
        (chunk(event("a")), b""),
        (chunk(b'data: {"text": "a"}\n'), b"\n"),
        (chunk(b'data: {"te'), b"\n\n"),
        (chunk(b"data: 1\r\n\r\n"), b""),
        (chunk(b"data: 1\r\n"), b"\n"),
    ],
    ids=[
        "after an event",
        "after a line",
        "inside a line",
        "after an event with CRLF",
        "after a CRLF line",
    ],
)
def test_a_stream_cut_between_chunks_ends_with_an_error_event_and_no_final_chunk(
    sent: bytes, closing: bytes, client: Reader, worker: ScriptedWorker
) -> None:
    first = chunk(event("first"))  # with less than a whole event there is no answer yet
    worker.script = cut_after(SSE + first + sent)
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    answer = client.answer()
    assert answer.status == 200
    assert not answer.is_complete
    assert answer.raw_body.startswith(first + sent)
    told = answer.body[len(event("first")) + len(sent.partition(b"\r\n")[2][:-2]) :]
    assert told.startswith(closing + b"data: ")
    error = json.loads(told.removeprefix(closing).removeprefix(b"data: "))
    assert error["error"]["code"] == "worker_bad_answer"
    assert b"[DONE]" not in answer.raw_body


@pytest.mark.parametrize("sent", [b"", b"5", chunk(b'data: {"te')])
def test_a_stream_cut_before_its_first_event_is_whole_is_502(
    sent: bytes, client: Reader, worker: ScriptedWorker
) -> None:
    worker.script = cut_after(SSE + sent)
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    answer = client.answer()
    assert (answer.status, answer.is_complete) == (502, True)


def test_a_stream_without_any_event_is_passed_on(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = answer_all(SSE + b"0\r\n\r\n")
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    answer = client.answer()
    assert (answer.status, answer.is_complete, answer.body) == (200, True, b"")


def test_a_stream_cut_inside_a_chunk_ends_at_once(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = cut_after(SSE + chunk(event("a")) + b"20\r\ndata: {")
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    answer = client.answer()
    assert not answer.is_complete
    assert answer.raw_body.endswith(b"20\r\ndata: {")


def test_a_short_body_is_a_short_body(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = cut_after(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    client.sock.sendall(post())
    answer = client.answer()
    assert not answer.is_complete
    assert answer.body == b"half"


def test_nonsense_in_the_framing_is_never_passed_on(client: Reader, worker: ScriptedWorker) -> None:
    go = threading.Event()

    def script(session: Session) -> None:
        session.read()
        session.write(SSE + chunk(event("a")))
        go.wait(30)
        session.write(b"zz\r\ngarbage\r\n")

    worker.script = script
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    assert client.head()[0] == 200
    go.set()
    assert b"garbage" not in client.until_closed()


def test_nonsense_in_the_first_bytes_is_still_a_502(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = cut_after(SSE + chunk(event("a")) + b"zz\r\ngarbage\r\n")
    client.sock.sendall(post(b"/v1/completions", STREAM_BODY))
    assert client.answer().status == 502


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"x" * 100_000],
    ids=["nothing", "half a head", "no HTTP", "bad length", "endless head"],
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_no_answer_or_nonsense_is_502(answer: bytes, reset: bool, client: Reader, worker: ScriptedWorker) -> None:
    worker.script = cut_after(answer, reset=reset)
    client.sock.sendall(post() + get(b"/health"))
    got = client.answer()
    assert got.status == 502
    assert b"worker_bad_answer" in got.body
    assert client.answer().body == b"OK", "the client's connection is not at fault"


def test_a_second_answer_nobody_asked_for_is_thrown_away(client: Reader, worker: ScriptedWorker) -> None:
    worker.script = answer_all(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")
    for _ in range(3):
        client.sock.sendall(post())
        assert client.answer().body == b"{}"
    assert worker.connections == 3, "a connection with surplus bytes must not be used again"


# --- connections to workers


def test_connections_are_kept_and_reused(plane: DataPlane, client: Reader, worker: ScriptedWorker) -> None:
    for _ in range(20):
        client.sock.sendall(post())
        assert client.answer().status == 200
    assert worker.connections == 1


def test_a_connection_that_died_idle_costs_no_request(client: Reader, worker: ScriptedWorker) -> None:
    """The worker's idle timeout crosses our request: it is sent again, once, on a fresh connection."""

    def script(session: Session) -> None:
        session.read()
        session.write(OK)
        session.read()  # read the second request, and close without an answer

    worker.script = script
    for _ in range(4):
        client.sock.sendall(post())
        assert client.answer().status == 200


def test_a_refused_connection_is_502_and_takes_the_worker_out_on_every_shard(plane: DataPlane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    plane.publish(worker_spec(1, f"http://127.0.0.1:{port}"))
    with plane.connect(0) as first, plane.connect(1) as second:
        first.sendall(post())
        answer = Reader(first).answer()
        assert answer.status == 502
        assert b"worker_connect_failed" in answer.body
        assert plane.segment.status(1) == at.STATUS_DOWN
        second.sendall(post())
        answer = Reader(second).answer()
        assert answer.status == 503
        assert answer.header(b"retry-after") is not None
        assert b"no_available_workers" in answer.body


def test_no_worker_at_all_is_503(plane: DataPlane, client: Reader) -> None:
    plane.publish()
    client.sock.sendall(post() + get(b"/readiness") + get(b"/health"))
    assert client.answer().status == 503
    assert client.answer().status == 503
    assert client.answer().status == 200


def test_strict_models_is_404(plane: DataPlane, client: Reader, worker: ScriptedWorker) -> None:
    plane.publish(worker_spec(0, worker.url, models=("known",)), strict_models=True)
    client.sock.sendall(post() + post(b"/v1/completions", b'{"model": "known"}'))
    answer = client.answer()
    assert answer.status == 404
    assert b"model_not_found" in answer.body
    assert client.answer().status == 200


def test_models_are_the_union(plane: DataPlane, client: Reader, worker: ScriptedWorker) -> None:
    plane.publish(worker_spec(0, worker.url, models=("a", "org/b")), worker_spec(1, worker.url, models=("a", "c")))
    client.sock.sendall(get(b"/v1/models") + get(b"/v1/models/org/b") + get(b"/v1/models/org%2Fb"))
    assert [card["id"] for card in json.loads(client.answer().body)["data"]] == ["a", "org/b", "c"]
    assert json.loads(client.answer().body)["id"] == "org/b"
    assert json.loads(client.answer().body)["id"] == "org/b"


# --- deadlines, clients that leave, slow readers


def test_a_client_that_leaves_frees_the_worker_at_once(plane: DataPlane, worker: ScriptedWorker) -> None:
    closed = threading.Event()

    def script(session: Session) -> None:
        session.read()
        session.write(SSE + chunk(event("a")))
        session.wait_closed()
        closed.set()

    worker.script = script
    with plane.connect() as sock:
        sock.sendall(post(b"/v1/completions", STREAM_BODY))
        reader = Reader(sock)
        reader.head()
        assert plane.in_flight() == 1
        left = time.monotonic()
    assert closed.wait(30)
    assert time.monotonic() - left < 0.5 * leeway()
    plane.wait_until("no request in flight", lambda: plane.in_flight() == 0)


def test_sglang_is_told_of_a_client_that_left_by_the_requests_own_id(plane: DataPlane, worker: ScriptedWorker) -> None:
    told: queue.Queue[tuple[bytes, bytes]] = queue.Queue()

    def script(session: Session) -> None:
        seen = session.read()
        assert seen is not None
        if seen.line.startswith(b"POST /abort_request "):
            told.put((seen.line, seen.body))
            session.write(OK)
        else:
            told.put((seen.line, b""))
            session.wait_closed()

    worker.script = script
    with plane.connect() as sock:
        sock.sendall(post(b"/generate", b'{"text": "x", "rid": "my \\"id"}'))
        assert told.get(timeout=30)[0].startswith(b"POST /generate ")
    assert told.get(timeout=30) == (b"POST /abort_request HTTP/1.1", b'{"rid":"my \\"id"}')
    plane.wait_until("no request in flight", lambda: plane.in_flight() == 0)


def pinging(**timeouts: float) -> dict[str, Any]:
    return {"profiles": {"p": Profile("p", timeouts={"ping_s": 0.05, **timeouts})}, "default_profile": "p"}


def test_pings_of_a_long_prefill(worker: ScriptedWorker) -> None:
    go = threading.Event()

    def script(session: Session) -> None:
        session.read()
        assert go.wait(30), "three pings come first"
        session.write(SSE + chunk(event("a")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        session.wait_closed()

    worker.script = script
    with data_plane(shards=2) as plane:
        plane.publish(worker_spec(0, worker.url), **pinging())
        with plane.connect() as sock:
            client = Reader(sock)
            sock.sendall(post(b"/v1/completions", STREAM_BODY))
            assert client.head()[0] == 200
            while client.rest.count(chunk(b": ping\n\n")) < 3:
                assert client._more()
            go.set()
            while not client.rest.endswith(b"0\r\n\r\n"):
                assert client._more()
            rest = client.rest.replace(chunk(b": ping\n\n"), b"")
            assert rest == chunk(event("a")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
            client.rest = b""
            sock.sendall(get(b"/health"))
            assert client.answer().body == b"OK", "the connection is in step"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        OK,
        b"",
        b"nonsense\r\n\r\n",
        SSE + chunk(b'data: {"te'),
    ],
    ids=["an error", "no stream", "nothing", "nonsense", "half an event"],
)
def test_after_a_ping_a_failure_is_an_error_event(answer: bytes, worker: ScriptedWorker) -> None:
    go = threading.Event()

    def script(session: Session) -> None:
        session.read()
        assert go.wait(30)
        session.write(answer)

    worker.script = script
    with data_plane(shards=2, disable_retries=False) as plane:
        plane.publish(worker_spec(0, worker.url), **pinging())
        with plane.connect() as sock:
            client = Reader(sock)
            sock.sendall(post(b"/v1/completions", STREAM_BODY))
            assert client.head()[0] == 200
            while chunk(b": ping\n\n") not in client.rest:
                assert client._more()
            go.set()
            while client._more():
                pass
            assert b'"code":"worker_bad_answer"' in client.rest
            assert not client.rest.endswith(b"0\r\n\r\n")
        plane.wait_until("no request in flight", lambda: plane.in_flight() == 0)


def test_a_client_that_leaves_before_any_answer_frees_the_worker(plane: DataPlane, worker: ScriptedWorker) -> None:
    closed = threading.Event()

    def script(session: Session) -> None:
        session.read()
        session.wait_closed()
        closed.set()

    worker.script = script
    sock = plane.connect()
    sock.sendall(post())
    worker.seen()
    sock.close()
    assert closed.wait(30)


def test_a_worker_that_never_answers_is_504(worker: ScriptedWorker) -> None:
    worker.script = silent_after()
    with data_plane(shards=2, workers=[worker.url], request_timeout_s=0.5) as quick, quick.connect() as sock:
        sock.sendall(post())
        answer = Reader(sock).answer()
        assert answer.status == 504
        assert b"request_total_timeout" in answer.body
        quick.wait_until("no request in flight", lambda: quick.in_flight() == 0)


def test_a_stream_that_outlives_its_time_is_cut_with_an_error_event(worker: ScriptedWorker) -> None:
    worker.script = silent_after(SSE + chunk(event("a")))
    with data_plane(shards=2, workers=[worker.url], request_timeout_s=0.5) as quick, quick.connect() as sock:
        sock.sendall(post(b"/v1/completions", STREAM_BODY))
        answer = Reader(sock).answer()
        assert not answer.is_complete
        assert b"request_total_timeout" in answer.body


def test_a_client_that_does_not_read_holds_the_worker_back(plane: DataPlane, worker: ScriptedWorker) -> None:
    """Nothing of a long answer piles up in the gateway: the worker's own send blocks until the client reads."""
    total, written, is_done = 64 << 20, [0], threading.Event()

    def script(session: Session) -> None:
        session.read()
        session.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        session.sock.settimeout(60)
        piece = b"x" * 65536
        for _ in range(total // len(piece)):
            session.write(piece)
            written[0] += len(piece)
        is_done.set()

    worker.script = script
    with plane.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(post())
        worker.seen()
        seen = -1
        while seen != written[0]:  # until the worker makes no progress any more
            seen = written[0]
            is_done.wait(0.3)
        assert not is_done.is_set()
        assert written[0] < total // 2
        reader = Reader(sock)
        reader.head()
        received = len(reader.rest)
        while received < total:
            received += len(sock.recv(1 << 20))
    assert is_done.wait(30)


def test_buffers_are_bounded_and_a_waiting_body_ends_in_503(worker: ScriptedWorker) -> None:
    with data_plane(shards=2, workers=[worker.url], buffer_mib=1, buffer_wait_s=0.3) as small:
        body = b'{"prompt": "' + b"x" * (3 << 20) + b'"}'
        with small.connect() as sock:
            threading.Thread(target=lambda: _send_quietly(sock, post(b"/v1/completions", body)), daemon=True).start()
            answer = Reader(sock).answer()
            assert answer.status == 503
            assert b"buffers_full" in answer.body
        small.wait_until("buffers empty", lambda: small.segment.gauge_total(at.G_BUFFERED_BYTES) == 0)
        with small.connect() as sock:
            sock.sendall(post())
            assert Reader(sock).answer().status == 200


def _send_quietly(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        sock.sendall(data)


def test_connections_are_bounded(worker: ScriptedWorker) -> None:
    with data_plane(shards=2, workers=[worker.url], max_connections=3) as few:
        held = [few.connect() for _ in range(3)]
        few.wait_until("three connections", lambda: few.segment.gauge_total(at.G_CONNECTIONS) == 3)
        with few.connect() as one_more:
            answer = Reader(one_more).answer()
            assert answer.status == 503
            assert b"too_many_connections" in answer.body
        for sock in held:
            sock.sendall(get(b"/health"))
            assert Reader(sock).answer().status == 200
            sock.close()


def test_draining_closes_connections_after_their_answers(worker: ScriptedWorker) -> None:
    go = threading.Event()

    def script(session: Session) -> None:
        session.read()
        go.wait(30)
        session.write(OK)

    worker.script = script
    with data_plane(shards=2, workers=[worker.url]) as stopping:
        with stopping.connect() as idle, stopping.connect() as busy:
            idle.sendall(get(b"/health"))
            Reader(idle).answer()
            busy.sendall(post())
            worker.seen()
            stopping.drain()
            assert Reader(idle).is_closed()
            go.set()
            reader = Reader(busy)
            answer = reader.answer()
            assert (answer.status, answer.header(b"connection")) == (200, b"close")
            assert reader.is_closed()
        for process in stopping.processes:
            assert process.wait(30) == 0
