"""Bodies that go past the parser: however they arrive, and whatever stands before and behind them, the worker sees
the bytes that the client sent.
"""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from pointsman.daemon.relay.client import LONG_BODY_BYTES
from pointsman.daemon.shm import layout as at
from tests.conformance.raw_http import Reader, get, post
from tests.fakes.data_plane import TIMEOUT_S, DataPlane, data_plane
from tests.fakes.scripted_worker import OK, ScriptedWorker, Session

PATH = b"/v1/completions"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def body_of(size: int, mark: object = "") -> bytes:
    """JSON in which no piece is like another."""
    start, end = b'{"model": "m", "prompt": "%b' % str(mark).encode(), b'"}'
    text = b" ".join(b"%d" % n for n in range(size // 2))
    return start + text[: size - len(start) - len(end)] + end


def chunked(body: bytes, chunk_bytes: int) -> bytes:
    pieces = [body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    return post(PATH, framed, b"Transfer-Encoding: chunked", length=False)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[ScriptedWorker]]:
    with ScriptedWorker() as one, ScriptedWorker() as other:
        yield [one, other]


@pytest.fixture(scope="module")
def worker(workers: list[ScriptedWorker]) -> ScriptedWorker:
    return workers[0]


@pytest.fixture(scope="module")
def plane(worker: ScriptedWorker) -> Iterator[DataPlane]:
    with data_plane(shards=2, workers=[worker.url]) as running:
        yield running


@pytest.fixture
def client(plane: DataPlane) -> Iterator[Reader]:
    with plane.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Reader(sock)


def buffered(plane: DataPlane) -> int:
    return sum(plane.segment.gauge(shard, at.G_BUFFERED_BYTES) for shard in range(2))


@pytest.fixture(autouse=True)
def _nothing_left_over(worker: ScriptedWorker, plane: DataPlane) -> Iterator[None]:
    yield
    plane.wait_until("nothing in flight, nothing buffered", lambda: plane.in_flight() == buffered(plane) == 0)
    assert worker.requests.empty()


def send_apart(sock: socket.socket, parts: Iterable[bytes]) -> None:
    """Each part is a read of its own: the next one is sent when the shard has the one before."""
    deadline = time.monotonic() + TIMEOUT_S
    for part in parts:
        sock.sendall(part)
        while unread_bytes(sock):
            assert time.monotonic() < deadline, "the shard does not read"
            select.select([], [], [], 0.0005)


def unread_bytes(sock: socket.socket) -> int:
    """What the other end, on this machine, has not taken from the kernel."""
    ours, theirs = sock.getsockname()[1], sock.getpeername()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if (int(local.partition(":")[2], 16), int(remote.partition(":")[2], 16)) == (theirs, ours):
            return int(queues.partition(":")[2], 16)
    raise AssertionError("the other end is gone")


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = [*sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


LONG = body_of(LONG_BODY_BYTES + 3000)
HEAD_BYTES = len(post(PATH, LONG)) - len(LONG)
PLACES = {
    "nowhere": (0,),
    "after the first byte": (1,),
    "within the length": (HEAD_BYTES - 6,),
    **{f"{4 - n} before the body": (HEAD_BYTES - 4 + n,) for n in range(4)},
    "before the body": (HEAD_BYTES,),
    "after its first byte": (HEAD_BYTES + 1,),
    "one too late to go past the parser": (HEAD_BYTES + 3001,),
    "as late as it can be": (HEAD_BYTES + 3000,),
    "one earlier": (HEAD_BYTES + 2999,),
    "before the last byte": (HEAD_BYTES + len(LONG) - 1,),
    "around the head": (HEAD_BYTES - 2, HEAD_BYTES),
    "often": tuple(range(0, HEAD_BYTES + len(LONG), 1999)),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_long_body_may_be_cut_anywhere(where: str, client: Reader, worker: ScriptedWorker) -> None:
    for _ in range(2):  # the connection goes on
        send_apart(client.sock, cut(post(PATH, LONG), PLACES[where]))
        assert client.answer().status == 200
        assert worker.seen().body == LONG


@pytest.mark.parametrize("size", [0, LONG_BODY_BYTES - 1, LONG_BODY_BYTES, LONG_BODY_BYTES + 1, 1_000_000])
def test_a_body_of_any_size_is_followed_by_the_next_request(size: int, client: Reader, worker: ScriptedWorker) -> None:
    body = body_of(size) if size else b"{}"
    both = post(PATH, body) + post(PATH, b'{"prompt": "next"}')
    client.sock.sendall(b"\r\n" + get(b"/health", b"Content-Length: 0") + both)
    assert [client.answer().status for _ in range(3)] == [200, 200, 200]
    assert [worker.seen().body, worker.seen().body] == [body, b'{"prompt": "next"}']


def test_byte_by_byte(client: Reader, worker: ScriptedWorker) -> None:
    request = post(PATH, LONG)
    send_apart(client.sock, (bytes((byte,)) for byte in request[: HEAD_BYTES + 50]))
    for byte in request[HEAD_BYTES + 50 :]:
        client.sock.sendall(bytes((byte,)))
    assert client.answer().status == 200
    assert worker.seen().body == LONG


@pytest.mark.parametrize("seed", range(30))
def test_requests_behind_each_other_in_any_pieces(seed: int, client: Reader, worker: ScriptedWorker) -> None:
    chance = random.Random(seed)
    data, bodies, answers = b"", list[bytes](), 0
    for number in range(chance.randint(2, 7)):
        body = body_of(chance.choice((60, 3000, LONG_BODY_BYTES, 20_000, 70_000)), f"{seed} {number} ")
        kind = chance.choice(("length", "length", "length", "chunks", "get"))
        data += b"\r\n" * chance.randint(0, 1)  # as some old clients do, and as a server has to ignore
        data += {"length": post(PATH, body), "chunks": chunked(body, 9000), "get": get(b"/health")}[kind]
        bodies += [body] if kind != "get" else []
        answers += 1
    places = [chance.randrange(len(data)) for _ in range(chance.randint(0, 6))]
    send_apart(client.sock, cut(data, places))
    assert [client.answer().status for _ in range(answers)] == [200] * answers
    assert [worker.seen().body for _ in bodies] == bodies


def test_what_follows_a_long_body_is_parsed_as_strictly_as_ever(client: Reader, worker: ScriptedWorker) -> None:
    client.sock.sendall(post(PATH, LONG) + b"x" + post(PATH, LONG))
    assert [client.answer().status, client.answer().status] == [200, 400]
    assert client.is_closed()
    assert worker.seen().body == LONG


@pytest.mark.parametrize("more", [b"", b"x", post(PATH, LONG)])
def test_nothing_is_served_behind_a_request_that_ends_the_connection(
    more: bytes, client: Reader, worker: ScriptedWorker
) -> None:
    client.sock.sendall(post(PATH, LONG, b"Connection: close") + more)
    assert client.answer().status == 200
    assert client.is_closed()
    assert worker.seen().body == LONG


def test_a_client_that_leaves_within_its_body_leaves_nothing(plane: DataPlane, worker: ScriptedWorker) -> None:
    for end in (HEAD_BYTES, HEAD_BYTES + 1, HEAD_BYTES + len(LONG) - 1):
        with plane.connect() as sock:
            send_apart(sock, [post(PATH, LONG)[:end]])
    assert worker.requests.empty()


def test_a_continue_comes_before_a_long_body(client: Reader, worker: ScriptedWorker) -> None:
    request = post(PATH, LONG, b"Expect: 100-continue")
    client.sock.sendall(request[: -len(LONG)])
    assert client.head()[0] == 100
    client.sock.sendall(LONG)
    assert client.answer().status == 200
    assert worker.seen().body == LONG


def test_a_long_body_that_is_not_json_is_refused(client: Reader) -> None:
    for body in (LONG[:-1] + b" ", LONG + b"}", b"[" * len(LONG)):
        client.sock.sendall(post(PATH, body))
        assert client.answer().status == 400


def test_the_body_alone_counts_as_buffered(client: Reader, plane: DataPlane, worker: ScriptedWorker) -> None:
    may_answer = threading.Event()

    def script(session: Session) -> None:
        while session.read() is not None:
            may_answer.wait(TIMEOUT_S)
            session.write(OK)

    usual, worker.script = worker.script, script
    try:
        with data_plane(shards=2, workers=[worker.url]) as fresh, fresh.connect() as sock:
            request = post(PATH, LONG)
            send_apart(sock, [request[:-10]])
            fresh.wait_until("most of it is there", lambda: buffered(fresh) == len(LONG) - 10)
            sock.sendall(request[-10:])
            assert worker.seen().body == LONG
            assert buffered(fresh) == len(LONG)
            may_answer.set()
            assert Reader(sock).answer().status == 200
            fresh.wait_until("released", lambda: buffered(fresh) == 0)
    finally:
        may_answer.set()
        worker.script = usual


def test_another_worker_gets_all_of_it_again(workers: list[ScriptedWorker]) -> None:
    tried = list[bytes]()

    def script(session: Session) -> None:
        while (seen := session.read()) is not None:
            tried.append(seen.body)
            session.write(BUSY if len(tried) == 1 else OK)

    usual = workers[0].script
    for worker in workers:
        worker.script = script
    try:
        urls = [worker.url for worker in workers]
        with data_plane(shards=2, workers=urls, disable_retries=False) as plane, plane.connect() as sock:
            sock.sendall(post(PATH, LONG))
            assert Reader(sock).answer().status == 200
        assert tried == [LONG, LONG]
    finally:
        for worker in workers:
            worker.script = usual
            while not worker.requests.empty():
                worker.requests.get_nowait()
