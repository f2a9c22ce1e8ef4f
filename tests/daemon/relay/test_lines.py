"""The access line is one line of JSON, whatever stands in it."""

from __future__ import annotations

import json
from math import nan
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.relay.lines import request_line

times = st.floats(0, 1e7) | st.just(nan)
counts = st.integers(0, 2**62)


def quoted(text: str) -> bytes:
    return json.dumps(text).encode()


def line(**fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "ts_s": 1.5, "request_id": b"req-1", "shard": 0, "client": b"::1", "key": b"", "method": b"POST",
        "path": b'"/v1"',
        "status": 200, "model": b'"m"', "is_stream": True, "profile": b'""', "policy": b"expected_cost",
        "generation": 3, "worker": b'"http://x"',
        "prefill": b"", "prefill_ms": nan, "transfer_ms": nan, "attempts": 2, "queue_ms": 0.5, "connect_ms": 0.25,
        "first_byte_ms": nan, "total_ms": 12.3456,
        "bytes_in": 1, "bytes_out": 2, "resends": 0, "continuations": 0, "reason": b"prefix",
        "prompt_tokens": None, "matched_tokens": 0,
        "cached_tokens": 5, "output_tokens": None, "end": b"complete", "termination": b"--",
    }  # fmt: skip
    out = request_line(**(values | fields))
    assert out.endswith(b"}\n")
    assert out.count(b"\n") == 1
    return dict(json.loads(out))


def test_names_and_values() -> None:
    assert line() == {
        "ts": 1.5, "event": "request", "id": "req-1", "shard": 0, "client": "::1", "method": "POST", "path": "/v1",
        "status": 200, "model": "m", "stream": True, "profile": "", "policy": "expected_cost", "generation": 3,
        "worker": "http://x", "attempts": 2, "queue_ms": 0.5, "connect_ms": 0.25,
        "first_byte_ms": None, "total_ms": 12.346, "bytes_in": 1,
        "bytes_out": 2, "resends": 0, "reason": "prefix", "prompt_tokens": None, "matched_tokens": 0,
        "cached_tokens": 5, "output_tokens": None, "end": "complete", "term": "--",
    }  # fmt: skip


def test_the_name_of_a_key_is_there_when_there_is_one() -> None:
    assert line(key=b'"team-a"')["key"] == "team-a"
    assert {name: value for name, value in line(key=b'"team-a"').items() if name != "key"} == line()


def test_a_stream_that_was_continued_says_how_often() -> None:
    assert line(continuations=2) == line() | {"continuations": 2}


def test_a_pair_names_its_prefill_worker_and_what_that_took() -> None:
    told = {"prefill": "http://y", "prefill_ms": 1.5, "transfer_ms": None}
    assert line(prefill=b'"http://y"', prefill_ms=1.5) == line() | told


def test_what_was_not_routed_has_no_reason() -> None:
    assert not {"reason", "matched_tokens", "output_tokens"} & line(reason=b"").keys()


@given(st.text(), st.text(), times, counts, st.none() | counts, st.integers(-(2**62), 2**62))
def test_anything_can_be_read_back(
    path: str, model: str, first_ms: float, size: int, tokens: int | None, number: int
) -> None:
    found = line(
        path=quoted(path),
        model=quoted(model),
        worker=quoted(path),
        first_byte_ms=first_ms,
        bytes_out=size,
        output_tokens=tokens,
        matched_tokens=number,
    )
    assert (found["path"], found["model"], found["worker"]) == (path, model, path)
    assert (found["bytes_out"], found["output_tokens"], found["matched_tokens"]) == (size, tokens, number)
    expected = None if first_ms != first_ms else first_ms
    assert found["first_byte_ms"] is None if expected is None else abs(found["first_byte_ms"] - expected) <= 0.00051
