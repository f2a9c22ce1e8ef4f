"""Response heads: what is understood, what is refused, what is passed on."""

import pytest

from pointsman.daemon.relay.framing import State
from pointsman.daemon.relay.heads import HeadError, client_head, framing_of, parse_response_head, request_head


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((status, *lines)) + b"\r\n\r\n"


def test_hop_by_hop_headers_and_those_named_in_connection_stop_here() -> None:
    parsed = parse_response_head(
        head(b"Connection: close, X-Secret", b"X-Secret: 1", b"Keep-Alive: 5", b"X-Kept: 2", b"Upgrade: h2c")
    )
    assert parsed.lines == b"\r\nX-Kept: 2"
    assert not parsed.keeps_alive


def test_framing_follows_the_rfc() -> None:
    assert framing_of(parse_response_head(head(b"Content-Length: 5")), b"POST").left == 5
    assert framing_of(parse_response_head(head(b"Content-Length: 5")), b"HEAD").is_done
    assert framing_of(parse_response_head(head(b"Transfer-Encoding: chunked")), b"GET").state is State.CHUNK_SIZE
    assert framing_of(parse_response_head(head()), b"GET").ends_with_connection
    for status in (b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 Not Modified"):
        assert framing_of(parse_response_head(head(b"Content-Length: 5", status=status)), b"GET").is_done


def test_chunked_wins_over_a_length_and_the_connection_is_not_reused() -> None:
    parsed = parse_response_head(head(b"Content-Length: 5", b"Transfer-Encoding: chunked"))
    assert parsed.is_chunked
    assert parsed.content_length is None
    assert not parsed.keeps_alive


def test_http_1_0_workers_close_unless_they_say_otherwise() -> None:
    assert not parse_response_head(head(status=b"HTTP/1.0 200 OK")).keeps_alive
    assert parse_response_head(head(b"Connection: keep-alive", status=b"HTTP/1.0 200 OK")).keeps_alive


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nNo-Colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Name: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nName : 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\nB: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\rB: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: \0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_malformed_heads_are_refused(raw: bytes) -> None:
    with pytest.raises(HeadError):
        parse_response_head(raw)


def test_a_http_1_0_client_gets_no_chunks() -> None:
    parsed = parse_response_head(head(b"Transfer-Encoding: chunked", b"Content-Type: text/event-stream; x"))
    assert parsed.is_event_stream
    out = client_head(parsed, is_http_1_0=True, keep_alive=False, own_headers=b"X-A: 1\r\n")
    assert b"chunked" not in out
    assert out.endswith(b"Connection: close\r\nX-A: 1\r\n\r\n")
    assert b"Transfer-Encoding: chunked\r\n" in client_head(
        parsed, is_http_1_0=False, keep_alive=True, own_headers=b"X-A: 1\r\n"
    )


def test_request_head_states_its_own_length() -> None:
    out = request_head(b"POST", b"/v1/x?y", b"h:1", b"A: b\r\n", b"Bearer k", 3, b"id-1")
    assert out == (
        b"POST /v1/x?y HTTP/1.1\r\nHost: h:1\r\nA: b\r\nAuthorization: Bearer k\r\n"
        b"Content-Length: 3\r\nX-Request-Id: id-1\r\n\r\n"
    )
