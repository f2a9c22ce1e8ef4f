"""Streams under `streamFailure: continue`, byte by byte: what a worker may do in the middle of one, what goes out."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec import structs

from pointsman.config.snapshot import Profile
from pointsman.daemon.shm import layout as at
from tests.conformance.raw_http import Answer, Reader, post
from tests.fakes.data_plane import DataPlane, data_plane, worker_spec
from tests.fakes.scripted_worker import ScriptedWorker, Session

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
CONTINUED = b": continued on another worker\n\n"
PING = b": ping\n\n"
THERE = b": continued on the same worker\n\n"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 9}
PROFILE = Profile(
    "p", stream_failure="continue", retry={"max_retries": 3, "initial_backoff_ms": 1}, timeouts={"idle_s": 5}
)
Step = Callable[[Session], bool]


def token(text: str, run: int = 1, finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish}
    document = {"id": f"run-{run}", "created": run, "choices": [choice]}
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


ERROR = b'data: {"error": {"message": "EngineCore died", "type": "server_error", "code": 500}}\n\n'
BAD_REQUEST = b'data: {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}\n\n'


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def whole(*events: bytes) -> Step:
    def step(session: Session) -> bool:
        session.write(SSE + chunks(*events) + LAST)
        return True

    return step


def broken(*pieces: bytes) -> Step:
    """Ends the connection after these; the last one need not be a whole event."""

    def step(session: Session) -> bool:
        session.write(SSE + chunks(*pieces))
        return False

    return step


class Turns:
    """What the workers do with the requests, in the order in which they come, whichever worker they come to."""

    def __init__(self, *steps: Step) -> None:
        self._steps = list(steps)
        self.bodies: list[Any] = []

    def __call__(self, session: Session) -> None:
        while (seen := session.read()) is not None:
            self.bodies.append(json.loads(seen.body))
            if not self._steps.pop(0)(session):
                return


@pytest.fixture
def workers() -> Iterator[list[ScriptedWorker]]:
    with ScriptedWorker() as first, ScriptedWorker() as second:
        yield [first, second]


@pytest.fixture(scope="module")
def shared_plane() -> Iterator[DataPlane]:
    with data_plane(shards=2, buffer_mib=1) as running:
        yield running


@pytest.fixture
def plane(shared_plane: DataPlane, workers: list[ScriptedWorker]) -> Iterator[DataPlane]:
    publish(shared_plane, workers)
    yield shared_plane
    shared_plane.wait_until("no request in flight", lambda: shared_plane.in_flight() == 0)
    shared_plane.wait_until("no body is kept", lambda: kept(shared_plane) == 0)


def publish(plane: DataPlane, workers: list[ScriptedWorker], profile: Profile = PROFILE) -> None:
    specs = [worker_spec(slot, worker.url) for slot, worker in enumerate(workers)]
    plane.publish(*specs, profiles={"p": profile}, default_profile="p")


def kept(plane: DataPlane) -> int:
    return plane.segment.gauge_total(at.G_BUFFERED_BYTES)


def ask(plane: DataPlane, workers: list[ScriptedWorker], *steps: Step, **fields: Any) -> tuple[Answer, Turns]:
    turns = Turns(*steps)
    for worker in workers:
        worker.script = turns
    with plane.connect() as sock:
        sock.sendall(post(b"/v1/chat/completions", json.dumps(BODY | fields).encode()))
        return Reader(sock).answer(), turns


def test_whole_events_in_chunks_of_ours(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    """What broke in the middle of an event is as if it had not been said; the rest is told in the first one's name."""
    half = token("lost")[:40]
    first, second = broken(b": hi\n\n", token("a"), token("b") + half), whole(token("c", 2), token("", 2, "stop"), DONE)
    answer, turns = ask(plane, workers, first, second)
    assert answer.is_complete
    parts = [b": hi\n\n", token("a"), token("b"), CONTINUED, token("c"), token("", 1, "stop"), DONE]
    assert answer.body == b"".join(parts)
    assert turns.bodies[1] == BODY | {
        "messages": [*BODY["messages"], {"role": "assistant", "content": "ab"}],  # type: ignore[misc]
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 7,
    }


def test_blanks_that_a_template_would_trim(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    first, second = (
        broken(token("a"), token("\n\n")),
        whole(token("\n\n", 2), token("b", 2), token("", 2, "stop"), DONE),
    )
    answer, turns = ask(plane, workers, first, second)
    assert turns.bodies[1]["messages"][-1]["content"] == "a"
    parts = [token("a"), token("\n\n"), CONTINUED, token("b"), token("", 1, "stop"), DONE]
    assert answer.body == b"".join(parts)


def test_an_error_that_the_worker_tells_in_the_middle(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    answer, turns = ask(plane, workers, whole(token("a"), ERROR, DONE), whole(token("b", 2, "stop"), DONE))
    assert answer.is_complete
    assert answer.body == token("a") + CONTINUED + token("b", 1, "stop") + DONE
    assert len(turns.bodies) == 2


@pytest.mark.parametrize("error", [ERROR, BAD_REQUEST])
def test_an_error_that_no_attempt_can_mend_is_passed_on(
    plane: DataPlane, workers: list[ScriptedWorker], error: bytes
) -> None:
    """As it came, with what follows it: a request that is at fault itself, or one attempt too many."""
    steps = [whole(token("a"), error, DONE)] * (1 if error is BAD_REQUEST else 3)
    answer, turns = ask(plane, workers, *steps)
    assert answer.is_complete
    assert answer.body.startswith(token("a"))
    assert answer.body.endswith(error + DONE)
    assert len(turns.bodies) == len(steps)


def test_a_stream_that_ends_too_early_in_good_order(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    answer, _ = ask(plane, workers, whole(token("a")), whole(token("b", 2, "stop"), DONE))
    assert answer.is_complete
    assert answer.body == token("a") + CONTINUED + token("b", 1, "stop") + DONE


def test_only_the_end_mark_was_missing(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    """Nothing is left to ask for."""
    answer, turns = ask(plane, workers, broken(token("a"), token("", 1, "stop")))
    assert answer.is_complete
    assert answer.body == token("a") + token("", 1, "stop") + DONE
    assert len(turns.bodies) == 1


def test_the_usage_was_missing(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    """The text is complete, what the client asked for is not: it is told so."""
    options = {"include_usage": True}
    answer, _ = ask(plane, workers, broken(token("a"), token("", 1, "stop")), stream_options=options)
    assert not answer.is_complete
    assert b'"worker_bad_answer"' in answer.body
    assert DONE not in answer.body


@pytest.mark.parametrize("delta", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_more_than_text(plane: DataPlane, workers: list[ScriptedWorker], delta: dict[str, Any]) -> None:
    """Ends as without the option, and whole events all the same."""
    answer, turns = ask(plane, workers, broken(token("", **delta), token("a")[:20]))
    assert not answer.is_complete
    assert answer.body.startswith(token("", **delta) + b'data: {"error"')
    assert len(turns.bodies) == 1


def test_an_answer_that_is_no_stream(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    def plain(session: Session) -> bool:
        session.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        return True

    answer, _ = ask(plane, workers, broken(token("a")), plain)
    assert not answer.is_complete
    assert b"did not go on" in answer.body


def test_a_compressed_stream_goes_the_ordinary_way(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    head = SSE[:-2] + b"Content-Encoding: gzip\r\n\r\n"

    def compressed(session: Session) -> bool:
        session.write(head + chunks(b"\x1f\x8b\n\n", b"no event") + LAST)
        return True

    answer, _ = ask(plane, workers, compressed)
    assert answer.raw_body == chunks(b"\x1f\x8b\n\n", b"no event") + LAST


def test_pings_while_the_other_worker_prefills(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    """Between whole events, and under the head that is out already."""
    publish(plane, workers, structs.replace(PROFILE, timeouts={"ping_s": 0.05}))
    go = threading.Event()

    def slow(session: Session) -> bool:
        assert go.wait(30)
        return whole(token("b", 2, "stop"), DONE)(session)

    turns = Turns(broken(token("a")), slow)
    for worker in workers:
        worker.script = turns
    with plane.connect() as sock:
        sock.sendall(post(b"/v1/chat/completions", json.dumps(BODY).encode()))
        begin = b""
        while begin.count(PING) < 3:
            begin += sock.recv(65536)
        go.set()
        reader = Reader(sock)
        reader.rest = begin
        answer = reader.answer()
    assert answer.is_complete
    assert answer.body.replace(PING, b"") == token("a") + CONTINUED + token("b", 1, "stop") + DONE


def test_a_sole_worker_is_asked_again(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    publish(plane, workers[:1])
    answer, _ = ask(plane, workers, broken(token("a")), whole(token("b", 2, "stop"), DONE))
    assert answer.body == token("a") + THERE + token("b", 1, "stop") + DONE


def test_the_clients_of_http_1_0_get_what_there_is(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    turns = Turns(broken(token("a")))
    for worker in workers:
        worker.script = turns
    with plane.connect() as sock:
        sock.sendall(post(b"/v1/chat/completions", json.dumps(BODY).encode(), version=b"1.0"))
        assert Reader(sock).answer().body.startswith(token("a") + b'data: {"error"')
    assert len(turns.bodies) == 1


@pytest.mark.parametrize(("size", "is_kept"), [(400_000, True), (700_000, False)])
def test_a_body_is_kept_only_while_there_is_room(
    plane: DataPlane, workers: list[ScriptedWorker], size: int, *, is_kept: bool
) -> None:
    """Half of the buffers (1 MiB here) is for requests that come; what is kept counts until the answer has ended."""
    go = threading.Event()

    def breaks_later(session: Session) -> bool:
        session.write(SSE + chunks(token("a")))
        assert go.wait(30)
        return False

    turns = Turns(breaks_later, whole(token("b", 2, "stop"), DONE))
    for worker in workers:
        worker.script = turns
    with plane.connect() as sock:
        body = BODY | {"messages": [{"role": "user", "content": "x" * size}]}
        sock.sendall(post(b"/v1/chat/completions", json.dumps(body).encode()))
        assert sock.recv(1, socket.MSG_PEEK) == b"H", "the answer has begun"
        assert kept(plane) >= (size if is_kept else 0)
        assert is_kept or kept(plane) == 0
        go.set()
        assert Reader(sock).answer().is_complete == is_kept
    assert len(turns.bodies) == 1 + is_kept


def test_a_client_that_does_not_read_while_it_breaks(plane: DataPlane, workers: list[ScriptedWorker]) -> None:
    """The second worker is held back like the first one, and nothing of either is lost."""
    padding = b": " + b"x" * 65_000 + b"\n\n"
    written = [threading.Event(), threading.Event()]

    def flood(number: int, end: bytes) -> Step:
        def step(session: Session) -> bool:
            session.write(SSE + chunks(token("ab"[number], number + 1)))
            session.write(chunks(*[padding] * 200))
            written[number].set()
            session.write(end)
            return bool(number)

        return step

    last = chunks(token("", 2, "stop"), DONE) + LAST
    turns = Turns(flood(0, b""), flood(1, last))
    for worker in workers:
        worker.script = turns
    with plane.connect() as sock:
        sock.sendall(post(b"/v1/chat/completions", json.dumps(BODY).encode()))
        assert not written[0].wait(0.3), "the first worker is held back"
        answer = Reader(sock).answer()
    assert answer.is_complete
    assert answer.body.count(padding) == 400
    assert answer.body.replace(padding, b"") == token("a") + CONTINUED + token("b") + token("", 1, "stop") + DONE
