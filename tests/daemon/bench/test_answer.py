"""An answer is read alike however its bytes are cut, and whatever is wrong with it is found."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.outcome import judge

TEXT = b'data: {"choices":[{"delta":{"content":"word"},"finish_reason":null}]}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"delta":{},"finish_reason":"length"}],"usage":null}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
WHOLE = (ROLE, TEXT, TEXT, FINISH, USAGE, DONE)
DOCUMENT = b'{"choices":[{"message":{"content":"word"}}],"usage":{"prompt_tokens":9,"completion_tokens":2}}'


def chunk(data: bytes) -> bytes:
    return b"%x;note=1\r\n%b\r\n" % (len(data), data)


def stream(*events: bytes, end: bytes = b"0\r\n\r\n", kind: bytes = b"text/event-stream; charset=utf-8") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTARGET-POD: w:1\r\ncontent-type: " + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(map(chunk, events)) + end


def document(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def read(data: bytes, *, is_stream: bool, cuts: list[int] | None = None) -> Answer:
    """Fed piece by piece; the time is the number of the piece."""
    answer = Answer((b"x-first", b"target-pod"))
    answer.expect(is_stream, Histogram())
    places = sorted({cut % len(data) for cut in cuts or []} | {0, len(data)})
    for number, (begin, end) in enumerate(pairwise(places)):
        if answer.feed(data[begin:end], number):
            break
    return answer


def kind(data: bytes, *, is_stream: bool = True) -> str:
    answer = read(data, is_stream=is_stream)
    ended_by = None if answer.is_complete or answer.problem or answer.end_of_input() else "cut"
    return judge(answer, wants_stream=is_stream, ended_by=ended_by).kind


CUTS = st.lists(st.integers(0, 2000), max_size=40)


@given(CUTS)
def test_a_stream_is_read_alike_however_it_is_cut(cuts: list[int]) -> None:
    answer = read(stream(*WHOLE), is_stream=True, cuts=cuts)
    assert answer.is_complete
    assert answer.problem is None
    assert (answer.status, answer.events, answer.texts, answer.worker) == (200, 5, 2, b"w:1")
    assert answer.received == len(stream(*WHOLE))
    verdict = judge(answer, wants_stream=True)
    assert (verdict.kind, verdict.prompt_tokens, verdict.completion_tokens, verdict.cached_tokens) == ("ok", 9, 2, 4)


@given(CUTS)
def test_a_document_is_read_alike_however_it_is_cut(cuts: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + document(DOCUMENT)
    answer = read(data, is_stream=False, cuts=cuts)
    assert answer.is_complete
    assert answer.body == DOCUMENT
    assert judge(answer, wants_stream=False).completion_tokens == 2


@given(st.binary(max_size=300), CUTS)
def test_no_bytes_do_harm(data: bytes, cuts: list[int]) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    for whole in (data, head + data, head + chunk(data)):
        if whole:
            answer = read(whole, is_stream=True, cuts=cuts)
            judge(answer, wants_stream=True)


def test_times_are_those_of_text_alone() -> None:
    gaps = Histogram()
    answer = Answer()
    answer.expect(True, gaps)
    head, _, rest = stream().partition(b"\r\n\r\n")
    assert rest == b"0\r\n\r\n"
    for at, piece in (
        (10, head + b"\r\n\r\n"),
        (20, chunk(ROLE)),
        (30, chunk(TEXT)),
        (70, chunk(TEXT)),
        (75, chunk(FINISH)),
    ):
        assert not answer.feed(piece, at)
    assert (answer.first_text_ns, answer.last_text_ns) == (30, 70)
    assert (gaps.count, gaps.total) == (1, 40)


def test_one_answer_after_the_other() -> None:
    answer = Answer((b"target-pod",))
    for _ in range(2):
        answer.expect(True, Histogram())
        assert answer.feed(stream(*WHOLE), 1)
        assert (answer.events, answer.texts, answer.keeps_alive) == (5, 2, True)
    answer.expect(False, Histogram())
    assert answer.feed(document(DOCUMENT), 1)
    assert (answer.events, answer.worker) == (0, None)


GENERATE_FIRST = b'data: {"text":"wo","meta_info":{"finish_reason":null,"completion_tokens":1}}\n\n'
GENERATE_LAST = (
    b'data: {"text":"word","meta_info":{"finish_reason":{"type":"length","length":2},"prompt_tokens":9,'
    b'"completion_tokens":2,"cached_tokens":4}}\n\n'
)


def test_sglang_own_stream() -> None:
    verdict = judge(read(stream(GENERATE_FIRST, GENERATE_LAST, DONE), is_stream=True), wants_stream=True)
    assert (verdict.kind, verdict.prompt_tokens, verdict.completion_tokens, verdict.cached_tokens) == ("ok", 9, 2, 4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (stream(*WHOLE), "ok"),
        (stream(b": a comment\n\n", b"id: 1\nevent: message\n", *WHOLE), "ok"),
        (stream(b"".join(WHOLE).replace(b"\n", b"\r\n")), "ok"),
        (stream(*WHOLE, end=b"0\r\nTrailer: x\r\n\r\n"), "ok"),
        (stream(ROLE, TEXT, FINISH, DONE), "ok"),  # no usage told
        (stream(GENERATE_FIRST, DONE), "incomplete"),
        (stream(ROLE, TEXT, FINISH, USAGE), "incomplete"),
        (stream(ROLE, TEXT, USAGE, DONE), "incomplete"),
        (stream(ROLE, FINISH, USAGE, DONE), "empty"),
        (stream(), "incomplete"),
        (stream(*WHOLE, TEXT), "after_done"),
        (stream(*WHOLE) + b"HTTP", "extra_bytes"),
        (stream(*WHOLE, end=b""), "cut"),
        (stream(*WHOLE, end=b"0\r\n"), "cut"),
        (stream(ROLE, TEXT, end=b"20\r\ndata: "), "cut"),
        (stream(TEXT, b'data: {"error":{"message":"x"}}\n\n', DONE), "stream_error"),
        (stream(TEXT, b'event: error\ndata: {"message":"x"}\n\n', DONE), "stream_error"),
        (stream(TEXT, b'data: {"choices"\n\n', DONE), "malformed_event"),
        (stream(TEXT, b"<html>\n", DONE), "malformed_event"),
        (stream(*WHOLE, kind=b"application/json"), "not_a_stream"),
        (document(DOCUMENT), "not_a_stream"),
        (stream(*WHOLE, end=b"x\r\n\r\n"), "malformed_http"),
        (stream(*WHOLE, end=b"3\r\nabcd\r\n0\r\n\r\n"), "malformed_http"),
        (stream(*WHOLE).replace(b"HTTP/1.1", b"HTTQ/1.1"), "malformed_http"),
        (document(b"no", b"503 Busy"), "http_503"),
    ],
)
def test_what_a_stream_may_be(data: bytes, expected: str) -> None:
    assert kind(data) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (document(DOCUMENT), "ok"),
        (document(b'{"text":"word","meta_info":{"completion_tokens":1}}'), "ok"),
        (document(b'{"choices":[{"text":"word"}]}'), "ok"),
        (document(b'{"choices":[{"message":{"content":null,"tool_calls":[{}]}}]}'), "ok"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + DOCUMENT, "ok"),  # ends with its connection
        (document(b'{"choices":[{"text":""}]}'), "empty"),
        (document(b'{"error":{"message":"x"}}'), "wrong_answer"),
        (document(b'{"object":"list"}'), "wrong_answer"),
        (document(b"<html>"), "wrong_answer"),
        (document(b""), "wrong_answer"),
        (document(DOCUMENT)[:-1], "cut"),
        (document(DOCUMENT) + b"\n", "extra_bytes"),
        (document(DOCUMENT, headers=b"Content-Length: 3\r\n"), "malformed_http"),
        (document(DOCUMENT, headers=b"no colon\r\n"), "malformed_http"),
        (document(DOCUMENT, b"2x0 OK"), "malformed_http"),
        (document(b"{}", b"429 Slow down"), "http_429"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "http_204"),
    ],
)
def test_what_a_document_may_be(data: bytes, expected: str) -> None:
    assert kind(data, is_stream=False) == expected


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n", True),
    ],
)
def test_whether_the_connection_is_kept(head: bytes, keeps: bool) -> None:
    assert read(head + b"Content-Length: 0\r\n\r\n", is_stream=False).keeps_alive is keeps


def test_the_first_header_of_the_list_names_the_worker() -> None:
    data = document(b"{}", headers=b"Target-Pod: second\r\nX-First:  first \r\n")
    assert read(data, is_stream=False).worker == b"first"
    data = document(b"{}", headers=b"X-First: first\r\nTarget-Pod: second\r\n")
    assert read(data, is_stream=False).worker == b"first"
