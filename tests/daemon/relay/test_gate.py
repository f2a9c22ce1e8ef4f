"""Which first events say that the request failed."""

import pytest

from pointsman.daemon.relay.gate import first_event_error
from pointsman.daemon.resilience.retry import OutcomeKind


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"error": {"message": "KV cache is full", "code": 503}}\n\n', 503),
        (b'data: {"error": {"message": "x", "type": "BadRequestError", "code": 400}}\n\n', 400),
        (b'data: {"error": {"message": "x", "code": "429"}}\n\n', 429),
        (b'data: {"error": {"message": "x", "code": "context_length_exceeded"}}\n\n', 0),
        (b'data: {"error": "transfer failed", "status_code": 500}\n\n', 500),
        (b'data: {"error": "transfer failed"}\r\n\r\n', 0),
        (b'event: error\ndata: {"message": "x", "code": 502}\n\n', 502),
    ],
)
def test_errors(event: bytes, status: int) -> None:
    for data in (event, chunked(event), chunked(event) + chunked(b"data: [DONE]\n\n")):
        outcome = first_event_error(data, 0)
        assert outcome is not None
        assert (outcome.kind, outcome.status) == (OutcomeKind.ERROR_EVENT, status)
    outcome = first_event_error(b"HTTP/1.1 200 OK\r\n\r\n" + event, 19)
    assert outcome is not None


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": [{"delta": {"content": "a \\"error\\": b"}}]}\n\n',
        b'data: {"choices": [], "error": null}\n\n',
        b'data: {"text": "\\"error\\""}\n\n',
        b'data: {"error": null, "text": "a"}\n\n',
        b'data: {"error": {}}\n\n',
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b"",
        b'data: {"error": {"message": "cut',
        b'data: "error"\n\n',
        b"event: error\n\n",
    ],
)
def test_what_is_none(event: bytes) -> None:
    assert first_event_error(event, 0) is None
    assert first_event_error(chunked(event), 0) is None
