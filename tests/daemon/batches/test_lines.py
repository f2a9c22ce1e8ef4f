"""Lines of input and output files: what is accepted, what is said of the rest, what is written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.batches import output_lines
from pointsman.daemon.batches.attempts import Answer
from pointsman.daemon.batches.files import lines_of
from pointsman.daemon.batches.grouping import BEGINNINGS, group_key
from pointsman.daemon.batches.input_lines import LineProblem, read_line, request_body
from pointsman.daemon.routing.request import json_features

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GOOD = {"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY}


def raw(**changes: Any) -> bytes:
    line = {**GOOD, **changes}
    return json.dumps({key: value for key, value in line.items() if value is not ...}).encode()


def problem_of(line: bytes, endpoint: str = CHAT) -> tuple[str, str | None]:
    with pytest.raises(LineProblem) as found:
        read_line(line, 7, endpoint)
    assert found.value.line == 7
    assert found.value.message
    return found.value.code, found.value.param


def test_a_good_line_keeps_its_body_byte_for_byte() -> None:
    line = b'{"body": {"model":"m",  "messages" : [], "seed": 1e0}, "url":"%b","method":"POST","custom_id":"x"}'
    line = line.replace(b"%b", CHAT.encode())
    assert read_line(line, 1, CHAT).custom_id == "x"
    assert request_body(line) == b'{"model":"m",  "messages" : [], "seed": 1e0}'


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[1]", "invalid_line", None),
        (b'{"body":' + b"[" * 5000, "invalid_json_line", None),
        (raw(custom_id=...), "missing_required_parameter", "custom_id"),
        (raw(custom_id=""), "missing_required_parameter", "custom_id"),
        (raw(custom_id=5), "missing_required_parameter", "custom_id"),
        (raw(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (raw(method="GET"), "invalid_method", "method"),
        (raw(method=...), "invalid_method", "method"),
        (raw(url="/v1/embeddings"), "mismatched_url", "url"),
        (raw(body=...), "missing_required_parameter", "body"),
        (raw(body=[1]), "invalid_body", "body"),
        (raw(body={**BODY, "stream": True}), "stream_not_allowed", "body.stream"),
        (raw(body={"messages": []}), "missing_required_parameter", "body.model"),
    ],
)
def test_bad_lines(line: bytes, code: str, param: str | None) -> None:
    assert problem_of(line) == (code, param)


def test_generate_needs_no_model() -> None:
    assert read_line(raw(url="/generate", body={"text": "hi"}), 1, "/generate").custom_id == "a"


# --- groups


def key_of(text: str, model: str = "m") -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return group_key(json_features(json.dumps(body).encode()))


def test_lines_that_share_a_beginning_stand_together() -> None:
    system, other = "s" * 5000, "o" * 5000
    texts = [f"{head}{'d' * 12000 if deep else ''}{n}" for n in range(4) for head in (system, other) for deep in (0, 1)]
    order = sorted(texts, key=key_of)
    assert runs([text[0] for text in order]) == 2, "those with one head side by side"
    deep = [n for n, text in enumerate(order) if "d" in text]
    assert [b - a for a, b in pairwise(deep)].count(1) == 6, "and within them those that share more"


def runs(values: list[str]) -> int:
    return 1 + sum(a != b for a, b in pairwise(values))


def test_models_are_groups_of_their_own_and_keys_have_one_length() -> None:
    assert key_of("hi") != key_of("hi", "n")
    assert len(key_of("")) == len(key_of("x" * 2 * BEGINNINGS[-1]))
    same = "x" * BEGINNINGS[-1]
    assert key_of(same + "1") == key_of(same + "2")


# --- cutting a stream into lines


async def cut(pieces: list[bytes], most: int = 1000) -> list[tuple[int, int, bytes | None]]:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return [line async for line in lines_of(stream(), most)]


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.data(), st.booleans())
async def test_lines_wherever_the_pieces_end(lines: list[bytes], data: st.DataObject, ends_open: bool) -> None:
    whole = b"\n".join(lines) + (b"" if ends_open else b"\n")
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
    found = await cut(pieces, most=20)
    split = whole.split(b"\n")
    expected = split[:-1] if not split[-1] else split
    assert [number for number, _, _ in found] == list(range(1, len(expected) + 1))
    for (_, place, line), want in zip(found, expected, strict=True):
        assert whole[place : place + len(want)] == want
        assert line == (None if len(want) > 20 else want.removesuffix(b"\r"))


# --- output


def test_an_answer_is_written_as_it_came() -> None:
    answer = Answer(200, "req-1", b'{"a":\n 1.0}')
    line = output_lines.render("batch_1", 3, "c", answer, None)
    assert b'"body":{"a":  1.0}' in line
    assert line.count(b"\n") == 1
    assert json.loads(line)["response"] == {"status_code": 200, "request_id": "req-1", "body": {"a": 1.0}}
    assert output_lines.has_succeeded(line)


def test_what_is_no_json_comes_as_text_and_a_failure_has_its_cause() -> None:
    answer = Answer(502, "req-1", b"<html>\xff")
    error = output_lines.LineError("http_502", "broke")
    told = json.loads(output_lines.render("batch_1", 3, "c", answer, error))
    assert told["response"]["body"] == "<html>�"
    assert told["error"] == {"code": "http_502", "message": "broke"}
    assert not output_lines.has_succeeded(output_lines.render("batch_1", 3, "c", None, output_lines.LOST))
