"""Requests that another process answers: streamed both ways, bounded, and ended so that nobody is misled."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conformance.raw_http import Reader, get, post
from tests.fakes.data_plane import DataPlane, data_plane
from tests.fakes.processes import resident_bytes

TIMEOUT_S = 60.0
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
Script = Callable[[socket.socket], None]


class FarSide:
    """Behind the unix socket: one script for each connection, in order."""

    def __init__(self, path: Path) -> None:
        self.scripts: list[Script] = []
        self.seen: list[bytes] = []
        """what each connection has sent"""
        self.ended = threading.Event()
        """a client's connection has ended"""
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX)
        self.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def listen(self) -> None:
        self._sock.bind(str(self._path))
        self._sock.listen()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            connection.settimeout(TIMEOUT_S)
            with connection:
                self.scripts.pop(0)(connection)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._path.unlink()
        self._thread.join(TIMEOUT_S)

    def reads_all(self, answer: bytes = OK) -> None:
        """The next connection is read to the end of its request, then answered."""

        def script(connection: socket.socket) -> None:
            self.seen.append(read_request(connection))
            connection.sendall(answer)

        self.scripts.append(script)

    def waits_for_the_end(self) -> None:
        def script(connection: socket.socket) -> None:
            read_to_end(connection)
            self.ended.set()

        self.scripts.append(script)


def read_request(connection: socket.socket) -> bytes:
    """As much as comes of it."""
    data = bytearray(connection.recv(65536))
    head, _, _ = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    size = len(head) + 4 + int(lengths[0].partition(b":")[2]) if lengths else len(head) + 4
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    while len(data) < size or (is_chunked and not data.endswith(b"\r\n0\r\n\r\n")):
        more = connection.recv(65536)
        if not more:
            break
        data += more
    return bytes(data)


def read_to_end(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


@pytest.fixture
def plane(request: pytest.FixtureRequest) -> Iterator[DataPlane]:
    """One shard with batches; the parameter has further settings."""
    options = getattr(request, "param", {})
    with (
        tempfile.TemporaryDirectory(prefix="pm-") as folder,
        data_plane(shards=1, batch_store="sqlite:x", runtime_dir=folder, **options) as running,
    ):
        yield running


@pytest.fixture
def far(plane: DataPlane) -> Iterator[FarSide]:
    side = FarSide(Path(plane.settings.runtime_dir) / "batch.sock")
    yield side
    side.close()


@pytest.fixture
def client(plane: DataPlane) -> Iterator[Reader]:
    with socket.create_connection(plane.address, timeout=TIMEOUT_S) as sock:
        yield Reader(sock)


def in_flight(plane: DataPlane) -> int:
    from pointsman.daemon.shm import layout as at

    return plane.segment.gauge_total(at.G_REQUESTS)


def test_a_request_arrives_as_it_was_sent_and_the_connection_stays(far: FarSide, client: Reader) -> None:
    far.reads_all()
    far.reads_all(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    forged = (b"Authorization: Bearer sk-1", b"X-Pointsman-Key: root", b"X-Custom: kept", b"Content-Type: multipart/x")
    client.sock.sendall(post(b"/v1/files?a=b", b"body", *forged))
    answer = client.answer()
    assert (answer.status, answer.body) == (200, b"{}")
    assert answer.header(b"x-request-id")
    assert answer.header(b"connection") is None
    head, _, body = far.seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/files?a=b HTTP/1.1\r\n")
    for line in (b"Authorization: Bearer sk-1", b"X-Custom: kept", b"Content-Length: 4", b"Connection: close"):
        assert line in head.split(b"\r\n")
    assert b"x-pointsman-key" not in head.lower()
    assert body == b"body"
    client.sock.sendall(get(b"/v1/batches/batch_1"))
    answer = client.answer(b"GET")
    assert (answer.status, answer.body) == (404, b"abc")
    assert far.seen[1].startswith(b"GET /v1/batches/batch_1 HTTP/1.1\r\n")


def test_a_chunked_upload(far: FarSide, client: Reader) -> None:
    far.reads_all()
    client.sock.sendall(post(b"/v1/files", b"", b"Transfer-Encoding: chunked", length=False))
    for piece in (b"abc", b"d" * 70_000):
        client.sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
    client.sock.sendall(b"0\r\n\r\n")
    assert client.answer().status == 200
    body = far.seen[0].partition(b"\r\n\r\n")[2]
    assert unchunk(body) == b"abc" + b"d" * 70_000


def unchunk(body: bytes) -> bytes:
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        pieces.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(pieces)


def test_pipelined_with_others_it_keeps_its_turn(far: FarSide, client: Reader) -> None:
    far.reads_all()
    far.reads_all(OK.replace(b"{}", b"[]"))
    upload = post(b"/v1/files", b"x" * 1000)
    client.sock.sendall(get(b"/health") + upload + get(b"/v1/batches") + get(b"/health"))
    assert [client.answer(b"GET").body for _ in range(4)] == [b"OK", b"{}", b"[]", b"OK"]


def test_an_old_client_gets_no_chunks(far: FarSide, client: Reader) -> None:
    far.reads_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    client.sock.sendall(get(b"/v1/files/f/content", version=b"1.0"))
    answer = client.answer(b"GET")
    assert answer.header(b"transfer-encoding") is None
    assert answer.header(b"connection") == b"close"
    assert answer.body == b"abcde"


def test_head(far: FarSide, client: Reader) -> None:
    far.reads_all(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    client.sock.sendall(get(b"/v1/files/f", method=b"HEAD") + get(b"/health"))
    assert client.answer(b"HEAD").header(b"content-length") == b"500"
    assert client.answer(b"GET").body == b"OK"


def test_refused_in_the_middle_the_client_learns_why(far: FarSide, client: Reader) -> None:
    def script(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        read_to_end(connection)

    far.scripts.append(script)
    client.sock.sendall(post(b"/v1/files", b"", b"Content-Length: 50000000", length=False) + b"x" * 100_000)
    answer = client.answer()
    assert (answer.status, answer.body, answer.header(b"connection")) == (413, b"big", b"close")


def test_nobody_there(plane: DataPlane, client: Reader) -> None:
    client.sock.sendall(get(b"/v1/batches") + get(b"/health"))
    answer = client.answer(b"GET")
    assert answer.status == 503
    assert b"batches_unavailable" in answer.body
    assert answer.header(b"retry-after") == b"2"
    assert client.answer(b"GET").body == b"OK", "the connection is as good as before"
    client.sock.sendall(post(b"/v1/files", b"", b"Content-Length: 5000", length=False) + b"x" * 100)
    answer = client.answer()
    assert (answer.status, answer.header(b"connection")) == (503, b"close")
    plane.wait_until("it has ended", lambda: in_flight(plane) == 0)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 2", b"nonsense\r\n\r\n"])
def test_no_answer_that_could_be_passed_on(far: FarSide, client: Reader, answer: bytes) -> None:
    far.reads_all(answer)
    client.sock.sendall(get(b"/v1/batches"))
    assert client.answer(b"GET").status == 503


def test_a_broken_answer_is_not_taken_for_a_whole_one(far: FarSide, client: Reader) -> None:
    far.reads_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    client.sock.sendall(get(b"/v1/files/f/content"))
    try:
        assert not client.answer(b"GET").is_complete
    except ConnectionResetError:
        return


def test_a_client_that_leaves_is_noticed(plane: DataPlane, far: FarSide, client: Reader) -> None:
    far.waits_for_the_end()
    client.sock.sendall(post(b"/v1/files", b"", b"Content-Length: 5000", length=False) + b"x" * 100)
    plane.wait_until("it is under way", lambda: in_flight(plane) == 1)
    client.sock.close()
    assert far.ended.wait(TIMEOUT_S)
    plane.wait_until("it has ended", lambda: in_flight(plane) == 0)


def test_nonsense_in_the_middle_of_a_body(plane: DataPlane, far: FarSide, client: Reader) -> None:
    far.waits_for_the_end()
    head = post(b"/v1/files", b"", b"Transfer-Encoding: chunked", length=False)
    client.sock.sendall(head + b"3\r\nabc\r\n")
    plane.wait_until("it is under way", lambda: in_flight(plane) == 1)
    client.sock.sendall(b"zz\r\n")
    answer = client.answer()
    assert (answer.status, answer.header(b"connection")) == (400, b"close")
    assert far.ended.wait(TIMEOUT_S), "the other side does not take it for a whole request"


def test_neither_side_is_read_faster_than_the_other_reads(plane: DataPlane, far: FarSide, client: Reader) -> None:
    """Each reader waits until the other side has written what it can: the shard holds next to nothing of it."""
    size, piece = 32 << 20, b"x" * (1 << 20)
    may_read, may_answer = threading.Event(), threading.Event()
    got = []

    def script(connection: socket.socket) -> None:
        may_read.wait(TIMEOUT_S)
        request = read_request(connection)
        got.append(len(request.partition(b"\r\n\r\n")[2]))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(piece)):
            connection.sendall(piece)

    far.scripts.append(script)
    pids = [process.pid for process in plane.processes]
    client.sock.sendall(get(b"/health"))
    client.answer(b"GET")
    before = resident_bytes(pids)
    sent = threading.Event()

    def send() -> None:
        client.sock.sendall(post(b"/v1/files", b"", b"Content-Length: %d" % size, length=False))
        for _ in range(size // len(piece)):
            client.sock.sendall(piece)
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert not sent.wait(1.0), "nobody reads, so the client has to wait"
    assert resident_bytes(pids) - before < 8 << 20
    may_read.set()
    assert sent.wait(TIMEOUT_S)
    sender.join()
    may_answer.wait(1.0)  # the answer is written into whatever takes it, and the client does not read
    assert resident_bytes(pids) - before < 8 << 20
    answer = client.answer()
    assert (len(answer.body), got) == (size, [size])


@pytest.mark.parametrize("plane", [{"body_timeout_s": 0.2}], indirect=True)
def test_a_client_that_stops_sending_is_not_waited_for_for_ever(far: FarSide, client: Reader) -> None:
    far.waits_for_the_end()
    client.sock.sendall(post(b"/v1/files", b"", b"Content-Length: 5000", length=False) + b"x")
    assert client.answer().status == 408
    assert far.ended.wait(TIMEOUT_S)


def test_paths_that_only_look_like_it_and_a_gateway_without_batches(plane: DataPlane, client: Reader) -> None:
    elsewhere = (b"/v1/files/../../operator/batches", b"/v1/files/%2e%2e/%2E%2E/operator/batches")
    for path in (b"/v1/filesystem", b"/v1/batches-x", b"/operator/batches", *elsewhere):
        client.sock.sendall(get(path))
        assert client.answer(b"GET").status == 404
    with data_plane(shards=1) as other, socket.create_connection(other.address, timeout=TIMEOUT_S) as sock:
        sock.sendall(get(b"/v1/files"))
        answer = Reader(sock).answer(b"GET")
        assert (answer.status, b"batches_off" in answer.body) == (404, True)


def test_a_token_that_is_not_ours_is_refused(plane: DataPlane, client: Reader) -> None:
    client.sock.sendall(post(b"/v1/completions", b"{}", b"X-Pointsman-Internal: guessed"))
    answer = client.answer()
    assert answer.status == 503
    assert b"internal_token_unknown" in answer.body
