"""Token counts in the bytes of an answer, against a plain reading of the same JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.relay.usage import NO_USAGE, holds_counts, read_usage


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":2}}}', (5, 3, 2)),
        (b'"usage": {"prompt_tokens" : 3, "completion_tokens": 5, "total_tokens": 8}', (5, 3, None)),
        (b'"meta_info":{"prompt_tokens":3,"completion_tokens":5,"cached_tokens":0}', (5, 3, 0)),
        (b'"usage":{"input_tokens":3,"output_tokens":5,"cache_read_input_tokens":1}', (5, 3, 1)),
        (b'"completion_tokens":1}\n\ndata: {"completion_tokens":2}', (2, None, None)),
        (b'"usage":null', (None, None, None)),
        (b'"completion_tokens":null', (None, None, None)),
        (b'"completion_tokens"', (None, None, None)),
        (b'_tokens":5', (None, None, None)),
        (b'"xcompletion_tokens":5, "max_tokens": 9, "reasoning_tokens":4', (None, None, None)),
        (b"", (None, None, None)),
    ],
)
def test_counts(data: bytes, found: tuple[int | None, ...]) -> None:
    usage = read_usage(data)
    assert (usage.output_tokens, usage.prompt_tokens, usage.cached_tokens) == found


def test_what_a_model_writes_is_no_count() -> None:
    text = 'the field "completion_tokens": 99, says the manual'
    usage = read_usage(json.dumps({"content": text, "usage": {"completion_tokens": 4}}).encode())
    assert usage.output_tokens == 4
    assert read_usage(json.dumps({"content": text}).encode()).output_tokens is None


@given(st.text(), st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1))
def test_any_text_around_changes_nothing(text: str, prompt: int, output: int) -> None:
    body = json.dumps({"a": text, "usage": {"prompt_tokens": prompt, "completion_tokens": output}, "b": text}).encode()
    assert holds_counts(body)
    usage = read_usage(body)
    assert (usage.prompt_tokens, usage.output_tokens) == (prompt, output)


@given(st.binary())
def test_any_bytes_are_read(data: bytes) -> None:
    if not holds_counts(data):
        assert read_usage(data).output_tokens is None
    assert NO_USAGE.output_tokens is None
