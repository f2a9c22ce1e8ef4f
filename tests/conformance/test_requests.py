"""HTTP/1.x requests: what is served, what is refused, and that the worker sees the very message that the client sent.

Every case runs against real shards; the worker is a raw socket that records each byte.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.conformance.raw_http import BODY, Reader, get, post
from tests.fakes.data_plane import DataPlane, data_plane
from tests.fakes.scripted_worker import ScriptedWorker


@pytest.fixture(scope="module")
def worker() -> Iterator[ScriptedWorker]:
    with ScriptedWorker() as scripted:
        yield scripted


@pytest.fixture(scope="module")
def plane(worker: ScriptedWorker) -> Iterator[DataPlane]:
    urls = [worker.url]
    with data_plane(shards=2, workers=urls, max_payload_size=100_000, max_header_bytes=16_384) as running:
        yield running


@pytest.fixture
def client(plane: DataPlane) -> Iterator[Reader]:
    with plane.connect() as sock:
        yield Reader(sock)


@pytest.fixture(autouse=True)
def _nothing_left_over(worker: ScriptedWorker, plane: DataPlane) -> Iterator[None]:
    yield
    plane.wait_until("no request in flight", lambda: plane.in_flight() == 0)
    while not worker.requests.empty():
        worker.requests.get_nowait()


AMBIGUOUS = {
    "both length and chunks": post(b"/v1/completions", BODY, b"Transfer-Encoding: chunked"),
    "two lengths": post(b"/v1/completions", BODY, b"Content-Length: 5"),
    "same length twice": post(b"/v1/completions", BODY, b"Content-Length: %d" % len(BODY)),
    "signed length": post(b"/v1/completions", BODY, b"Content-Length: +33", length=False),
    "length list": post(b"/v1/completions", BODY, b"Content-Length: 33, 33", length=False),
    "hex length": post(b"/v1/completions", BODY, b"Content-Length: 0x21", length=False),
    "space before the colon": post(b"/v1/completions", BODY, b"Content-Length : 33", length=False),
    "gzip coding": post(b"/v1/completions", BODY, b"Transfer-Encoding: gzip, chunked", length=False),
    "unknown coding": post(b"/v1/completions", BODY, b"Transfer-Encoding: xchunked", length=False),
    "coding twice": post(
        b"/v1/completions", b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", length=False
    ),
    "chunks from HTTP/1.0": post(
        b"/v1/completions", b"0\r\n\r\n", b"Transfer-Encoding: chunked", length=False, version=b"1.0"
    ),
    "obsolete folding": post(b"/v1/completions", BODY, b"X-A: 1\r\n folded"),
    "no host": post(host=False),
    "two hosts": post(b"/v1/completions", BODY, b"Host: other"),
    "two authorizations": post(b"/v1/completions", BODY, b"Authorization: a", b"Authorization: b"),
    "two content types": post(b"/v1/completions", BODY, b"Content-Type: a/b", b"Content-Type: a/c"),
    "nul in a value": post(b"/v1/completions", BODY, b"X-A: a\0b"),
    "bell in a value": post(b"/v1/completions", BODY, b"X-A: a\x07b"),
    "delete in a value": post(b"/v1/completions", BODY, b"X-A: a\x7fb"),
    "bare carriage return": post(b"/v1/completions", BODY, b"X-A: a\rX-B: b"),
    "bad chunk size": post(
        b"/v1/completions", b"zz\r\nhello\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", length=False
    ),
    "signed chunk size": post(
        b"/v1/completions", b"+5\r\nhello\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", length=False
    ),
    "chunk without its end": post(
        b"/v1/completions", b"5\r\nhelloXX0\r\n\r\n", b"Transfer-Encoding: chunked", length=False
    ),
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "bad version": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "space in the target": b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
    "fragment in the target": get(b"/health#x"),
    "authority form": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
    "header name with a space": post(b"/v1/completions", BODY, b"X A: 1"),
    "empty header name": post(b"/v1/completions", BODY, b": 1"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_two_readers_could_read_in_two_ways_is_refused_and_the_connection_closed(
    name: str, client: Reader, worker: ScriptedWorker
) -> None:
    client.sock.sendall(AMBIGUOUS[name])
    answer = client.answer()
    assert 400 <= answer.status < 506
    assert answer.header(b"connection") == b"close"
    client.sock.shutdown(socket.SHUT_WR)
    assert client.is_closed()
    assert worker.requests.empty(), "the worker must not see any of it"


def test_the_worker_gets_the_body_byte_for_byte_under_a_length_of_ours(client: Reader, worker: ScriptedWorker) -> None:
    body = b'{"model":"m",  "unknown_field": [1,2,{"x":null}], "prompt":"\\u00e9\xc3\xa9"}'
    client.sock.sendall(
        post(
            b"/v1/completions?a=1&b=%2F",
            body,
            b"X-Custom: Value",
            b"Authorization: Bearer sk-1",
            b"traceparent: 00-1-2-01",
        )
    )
    assert client.answer().status == 200
    seen = worker.seen()
    assert seen.line == b"POST /v1/completions?a=1&b=%2F HTTP/1.1"
    assert seen.body == body
    assert seen.all(b"content-length") == [b"%d" % len(body)]
    assert seen.header(b"x-custom") == b"Value"
    assert seen.header(b"authorization") == b"Bearer sk-1"
    assert seen.header(b"traceparent") == b"00-1-2-01"
    assert seen.header(b"host") == worker.url.removeprefix("http://").encode()


def test_chunks_arrive_at_the_worker_as_one_body_with_a_length(client: Reader, worker: ScriptedWorker) -> None:
    head = post(b"/v1/completions", b"", b"Transfer-Encoding: chunked", b"Trailer: X-T", length=False)
    client.sock.sendall(head)
    for piece in (BODY[:7], BODY[7:]):
        client.sock.sendall(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
    client.sock.sendall(b"0\r\nX-T: 1\r\n\r\n")
    assert client.answer().status == 200
    seen = worker.seen()
    assert seen.body == BODY
    assert seen.header(b"transfer-encoding") is None
    assert seen.header(b"content-length") == b"%d" % len(BODY)


def test_hop_by_hop_headers_do_not_reach_the_worker(client: Reader, worker: ScriptedWorker) -> None:
    client.sock.sendall(
        post(
            b"/v1/completions",
            BODY,
            b"Connection: keep-alive, X-Named",
            b"X-Named: 1",
            b"Keep-Alive: timeout=5",
            b"Proxy-Authorization: Basic x",
            b"TE: trailers",
            b"Upgrade: h2c",
            b"X-Kept: 1",
        )
    )
    assert client.answer().status == 200
    seen = worker.seen()
    names = {name.lower() for name, _ in seen.headers}
    assert not names & {b"connection", b"x-named", b"keep-alive", b"proxy-authorization", b"te", b"upgrade"}
    assert b"x-kept" in names


def test_pipelined_requests_are_answered_in_order(client: Reader) -> None:
    client.sock.sendall(post() + get(b"/health") + post(b"/nowhere") + get(b"/v1/models"))
    assert client.answer().body == b"{}"
    assert client.answer().body == b"OK"
    assert client.answer().status == 404
    assert b'"object":"list"' in client.answer().body


def test_an_upgrade_that_is_asked_for_is_ignored(client: Reader) -> None:
    client.sock.sendall(get(b"/health", b"Connection: Upgrade", b"Upgrade: websocket") + get(b"/health"))
    assert client.answer().body == b"OK"
    assert client.answer().body == b"OK"


def test_http_1_0_closes_unless_it_asks_to_keep_alive(plane: DataPlane) -> None:
    with plane.connect() as sock:
        reader = Reader(sock)
        sock.sendall(get(b"/health", version=b"1.0"))
        assert reader.answer().body == b"OK"
        assert reader.is_closed()
    with plane.connect() as sock:
        reader = Reader(sock)
        for _ in range(2):
            sock.sendall(get(b"/health", b"Connection: keep-alive", version=b"1.0"))
            answer = reader.answer()
            assert answer.header(b"connection") == b"keep-alive"


def test_connection_close_is_honoured(client: Reader) -> None:
    client.sock.sendall(post(b"/v1/completions", BODY, b"Connection: close"))
    answer = client.answer()
    assert answer.status == 200
    assert answer.header(b"connection") == b"close"
    assert client.is_closed()


def test_head_has_no_body(client: Reader) -> None:
    client.sock.sendall(get(b"/health", method=b"HEAD") + get(b"/health"))
    assert client.answer(b"HEAD").header(b"content-length") == b"2"
    assert client.answer().body == b"OK"


def test_expect_continue_is_answered_before_the_body(client: Reader) -> None:
    request = post(b"/v1/completions", BODY, b"Expect: 100-continue")
    client.sock.sendall(request[: -len(BODY)])
    status, _ = client.head()
    assert status == 100
    client.sock.sendall(BODY)
    assert client.answer().status == 200


def test_an_unknown_expectation_is_refused(client: Reader) -> None:
    client.sock.sendall(post(b"/v1/completions", BODY, b"Expect: 200-ok"))
    assert client.answer().status == 417


@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
def test_a_body_over_the_limit_gets_a_413_that_the_client_can_read(declared: bool, client: Reader) -> None:
    """The client sends all of its body before it reads: a closed socket would reset and eat the answer."""
    size = 3_000_000
    if declared:
        client.sock.sendall(post(b"/v1/completions", b"", b"Content-Length: %d" % size, length=False))
    else:
        client.sock.sendall(post(b"/v1/completions", b"", b"Transfer-Encoding: chunked", length=False))
        client.sock.sendall(b"%x\r\n" % size)
    piece = b"x" * 50_000
    for _ in range(size // len(piece)):
        client.sock.sendall(piece)
    answer = client.answer()
    assert answer.status == 413
    assert b"max_payload_size" in answer.body
    assert client.is_closed()


def test_an_expectation_for_too_much_is_refused_without_a_body(client: Reader) -> None:
    head = post(b"/v1/completions", b"", b"Expect: 100-continue", b"Content-Length: 3000000", length=False)
    client.sock.sendall(head)
    assert client.answer().status == 413


@pytest.mark.parametrize(
    "head",
    [
        post(b"/v1/completions", BODY, b"X-Big: " + b"a" * 20_000),
        post(b"/v1/completions", BODY, *(b"X-%d: 1" % i for i in range(200))),
        get(b"/" + b"a" * 20_000),
    ],
    ids=["one long value", "too many", "long target"],
)
def test_a_head_that_is_too_large_is_431(head: bytes, client: Reader) -> None:
    client.sock.sendall(head)
    assert client.answer().status == 431
    assert client.is_closed()


def test_an_endless_head_is_431_before_it_ends(client: Reader) -> None:
    client.sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: ")
    try:
        for _ in range(50):
            client.sock.sendall(b"a" * 1000)
    except OSError:
        pass
    assert client.answer().status == 431


def test_absolute_form_is_accepted(client: Reader, worker: ScriptedWorker) -> None:
    client.sock.sendall(post(b"http://gateway/v1/completions?x=1"))
    assert client.answer().status == 200
    assert worker.seen().line == b"POST /v1/completions?x=1 HTTP/1.1"


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{bad", "invalid_json"), (b"[1]", "invalid_body"), (b"", "invalid_json"), (b'{"a": 1} x', "invalid_json")],
)
def test_a_body_that_is_not_a_json_object_is_400_and_the_connection_goes_on(
    body: bytes, code: str, client: Reader
) -> None:
    client.sock.sendall(post(b"/v1/chat/completions", body) + get(b"/health"))
    answer = client.answer()
    assert answer.status == 400
    assert code.encode() in answer.body
    assert client.answer().body == b"OK"


def test_deep_nesting_is_no_crash(client: Reader) -> None:
    client.sock.sendall(post(b"/v1/completions", b'{"a":' + b"[" * 40_000 + b"]" * 40_000 + b"}"))
    assert client.answer().status in (200, 400)


def test_method_and_path_errors(client: Reader) -> None:
    client.sock.sendall(get(b"/v1/completions") + get(b"/V1/models") + post(b"/health") + get(b"/v1/models/none"))
    first = client.answer()
    assert (first.status, first.header(b"allow")) == (405, b"POST")
    assert client.answer().status == 404
    assert client.answer().status == 405
    last = client.answer()
    assert last.status == 404
    assert b"model_not_found" in last.body


def test_request_id_is_kept_if_sane_made_if_not_and_forwarded(client: Reader, worker: ScriptedWorker) -> None:
    client.sock.sendall(post(b"/v1/completions", BODY, b"X-Request-Id: abc-123"))
    assert client.answer().header(b"x-request-id") == b"abc-123"
    assert worker.seen().all(b"x-request-id") == [b"abc-123"]
    client.sock.sendall(post(b"/v1/completions", BODY, b'X-Request-Id: bad"id' + b"x" * 300))
    made = client.answer().header(b"x-request-id")
    assert made is not None
    assert made.startswith(b"req-")
    assert worker.seen().all(b"x-request-id") == [made]


def test_a_worker_key_replaces_the_clients(plane: DataPlane) -> None:
    from tests.fakes.data_plane import worker_spec

    with ScriptedWorker() as keyed, data_plane(shards=2) as other:
        other.publish(worker_spec(0, keyed.url, api_key="secret"))
        with other.connect() as sock:
            sock.sendall(post(b"/v1/completions", BODY, b"Authorization: Bearer client"))
            assert Reader(sock).answer().status == 200
        assert keyed.seen().all(b"authorization") == [b"Bearer secret"]


def test_form_requests_are_routed_by_their_model_field(client: Reader, worker: ScriptedWorker) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + bytes(range(256))
        + b"\r\n--b--\r\n"
    )
    client.sock.sendall(post(b"/v1/audio/transcriptions", body, b"Content-Type: multipart/form-data; boundary=b"))
    assert client.answer().status == 200
    assert worker.seen().body == body


def test_bytes_that_trickle_in_make_the_same_request(client: Reader, worker: ScriptedWorker) -> None:
    for byte in post():
        client.sock.sendall(bytes((byte,)))
    assert client.answer().status == 200
    assert worker.seen().body == BODY


def test_a_slow_head_or_body_is_408(worker: ScriptedWorker) -> None:
    with data_plane(shards=2, workers=[worker.url], header_timeout_s=0.5, body_timeout_s=0.5) as quick:
        for start in (b"GET /health HTTP/1.1\r\nHost", post()[:-5], post(b"/v1/completions", b" " * 40_000)[:-5]):
            with quick.connect() as sock:
                sock.sendall(start)
                reader = Reader(sock)
                assert reader.answer().status == 408
                assert reader.is_closed()


def test_ipv6_clients_are_served(worker: ScriptedWorker) -> None:
    with data_plane(shards=2, workers=[worker.url], host="::1") as six, six.connect() as sock:
        sock.sendall(post())
        assert Reader(sock).answer().status == 200
