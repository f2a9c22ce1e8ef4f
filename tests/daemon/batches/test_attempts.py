"""What one attempt at a line means."""

from __future__ import annotations

import pytest

from pointsman.daemon.batches.attempts import (
    MAX_PAUSE_S,
    Again,
    Answer,
    Done,
    Failed,
    Unreachable,
    judge,
    parse_retry_after,
)


def answer(status: int, body: bytes = b"{}", retry_after_s: float | None = None) -> Answer:
    return Answer(status, "r", body, retry_after_s)


def test_success_is_done() -> None:
    assert judge(answer(200), 1, 0, 4, 0.5) == Done()


@pytest.mark.parametrize("status", [500, 502, 504, 408, 404])
def test_what_may_pass_is_tried_again_and_costs_an_attempt(status: int) -> None:
    first = judge(answer(status), 1, 0, 3, 0.0)
    assert isinstance(first, Again)
    assert first.costs_attempt
    assert isinstance(judge(answer(status), 3, 2, 3, 0.0), Failed)


@pytest.mark.parametrize("outcome", [answer(429), answer(503), Unreachable("refused")])
def test_what_says_nothing_of_the_line_costs_none(outcome: Answer | Unreachable) -> None:
    found = judge(outcome, 1000, 50, 3, 0.0)
    assert isinstance(found, Again)
    assert not found.costs_attempt
    assert found.after_s == MAX_PAUSE_S


def test_retry_after_is_obeyed() -> None:
    found = judge(answer(429, retry_after_s=77.0), 1, 0, 3, 0.0)
    assert isinstance(found, Again)
    assert found.after_s == 77.0


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b'{"error":{"message":"too long","code":"context_length"}}', "context_length", "too long"),
        (b'{"error":{"message":"no","code":null,"type":"BadRequest"}}', "BadRequest", "no"),
        (b'{"error":"plain"}', "http_400", "plain"),
        (b'{"object":"error","message":"vllm"}', "http_400", "vllm"),
        (b'{"detail":"fastapi"}', "http_400", "fastapi"),
        (b"<html>", "http_400", "the request was answered with status 400"),
        (b'{"error":{"message":5}}', "http_400", "the request was answered with status 400"),
    ],
)
def test_the_cause_is_told_in_the_engines_words(body: bytes, code: str, message: str) -> None:
    assert judge(answer(400, body), 1, 0, 4, 0.0) == Failed(code, message)


def test_retry_after_in_a_form_that_we_know() -> None:
    assert parse_retry_after("3") == 3.0
    assert parse_retry_after("999999") == 600.0
    assert parse_retry_after("Wed, 21 Oct 2026 07:28:00 GMT") is None
    assert parse_retry_after(None) is None
