"""The two letters that say who ended a request, and where it was."""

from __future__ import annotations

import json

import pytest

from pointsman.daemon.errors import Fault
from pointsman.daemon.relay.access import text_line
from pointsman.daemon.relay.ending import Ending, short_termination, termination


@pytest.mark.parametrize(
    ("ending", "status", "blame", "phase", "expected"),
    [
        (Ending.COMPLETE, 200, None, "D", "--"),
        (Ending.COMPLETE, 500, None, "D", "--"),  # the worker's own error, relayed to its end
        (Ending.CLIENT_LEFT, 499, None, "Q", "CQ"),
        (Ending.CLIENT_LEFT, 499, None, "H", "CH"),
        (Ending.CLIENT_LEFT, 200, None, "D", "CD"),
        (Ending.WORKER_BROKE, 200, Fault.WORKER, "D", "SD"),
        (Ending.REFUSED, 502, Fault.WORKER, "C", "SC"),
        (Ending.REFUSED, 502, Fault.WORKER, "H", "SH"),
        (Ending.TIMEOUT, 504, Fault.WORKER, "H", "sH"),
        (Ending.TIMEOUT, 408, Fault.CLIENT, "D", "cD"),
        (Ending.REFUSED, 504, Fault.WORKER, "H", "sH"),
        (Ending.REFUSED, 400, Fault.CLIENT, "Q", "PR"),
        (Ending.REFUSED, 429, Fault.GATEWAY, "Q", "RQ"),
        (Ending.REFUSED, 503, Fault.OPERATOR, "Q", "KQ"),
        (Ending.DRAINED, 503, None, "H", "KH"),
        (Ending.SHUTDOWN, 200, None, "D", "KD"),
    ],
)
def test_who_and_where(ending: Ending, status: int, blame: Fault | None, phase: str, expected: str) -> None:
    assert termination(ending, status, blame, phase) == expected


@pytest.mark.parametrize(
    ("ending", "status", "expected"),
    [
        (Ending.COMPLETE, 200, "--"),
        (Ending.REFUSED, 401, "PR"),
        (Ending.REFUSED, 408, "cR"),
        (Ending.CLIENT_LEFT, 499, "CR"),
        (Ending.SHUTDOWN, 503, "KR"),
    ],
)
def test_of_what_no_worker_was_asked(ending: Ending, status: int, expected: str) -> None:
    assert short_termination(ending, status) == expected


def test_a_line_as_text_is_one_line_of_words() -> None:
    fields = {"ts": 1795267810.2344, "event": "request", "id": "req-1", "shard": 0, "client": "::1", "method": "GET"}
    fields |= {"path": '/a b"\n=', "status": 404, "model": "", "stream": False, "cached_tokens": None, "term": "PR"}
    line = text_line(json.dumps(fields).encode() + b"\n").decode()
    assert line == '2026-11-21T13:30:10.234Z ::1 GET "/a b\\"\\n=" 404 PR id=req-1 shard=0 stream=0\n'
