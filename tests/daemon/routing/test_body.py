"""The native scan of request bodies: it finds what the decoder finds, or says that it is not certain."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.daemon.routing.body import Features, scan
from pointsman.scripts import fuzz_body
from pointsman.scripts.fuzz_body import Disagreement, Judge, fuzz, width

KEYS = [*fuzz_body.KEYS, *fuzz_body.INNER_KEYS]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}]
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USUAL_BODIES: list[Any] = [
    {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "temperature": 0.7},
    {"model": "m", "messages": [{"role": "user", "content": 'Zwölf\n"Boxkämpfer" 😀 \\ /'}], "max_tokens": 16},
    {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, IMAGE]}], "tools": TOOLS},
    {"model": "m", "messages": [{"role": "assistant", "content": None, "tool_calls": CALLS}], "seed": -5},
    {"model": "m", "messages": [{"role": "user", "content": "x" * 40000}], "stream_options": {"include_usage": True}},
    {"model": "m", "system": "s", "messages": [{"role": "user", "content": "u"}], "max_tokens": 1024},
    {"model": "m", "prompt": "Once", "n": 2, "stop": ["\n"], "stream": False},
    {"model": "m", "prompt": ["a", "b"]},
    {"model": "m", "prompt": [1, 2, 3]},
    {"model": "m", "input": "text to embed", "encoding_format": "float"},
    {"model": "m", "instructions": "do", "input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]},
    {"text": "Hi", "sampling_params": {"max_new_tokens": 5, "temperature": 0}, "rid": "r1", "lora_path": "l"},
    {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 5}},
    {"messages": [], "max_completion_tokens": 5, "max_tokens": None},
    {},
]


@pytest.mark.parametrize("body", USUAL_BODIES)
@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}])
def test_what_clients_send_is_scanned(body: Any, style: dict[str, Any]) -> None:
    assert Judge().judge(json.dumps(body, **style).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"a": 1',
        b'{"a": 1}}',
        b'{"a": 1,}',
        b'{"a": [1 2]}',
        b'{"a": "x}',
        b'{"a": "\x01"}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\\x"}',
        b'{"a": "\\ud800"}',
        b'{"a": 01}',
        b'{"a": 1e400}',
        b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"a": 1}\0',
        b'{"m\\u006fdel": "x"}',
        b'{"model": "a\\/b"}',
        b'{"model": "a", "model": "b"}',
        b'{"messages": "x"}',
        b'{"messages": [{"content": "a", "content": "b"}]}',
        b'{"messages": [{"c\\u006fntent": "a"}]}',
        b'{"messages": [null]}',
        b'{"prompt": [1, "a"]}',
        b'{"prompt": [1, 2.0]}',
        b'{"input_ids": [4294967296]}',
        b'{"max_tokens": true}',
        b'{"max_tokens": 5.0}',
        b'{"max_tokens": 123456789012345678901}',
    ],
)
def test_what_could_be_read_differently_is_left_to_a_parser(body: bytes) -> None:
    assert scan(body) is None


def test_the_prompt_is_spans_of_the_body() -> None:
    body = b'{"messages": [{"content": "a"}, {"tool_calls": [ 1 ], "content": [{"text": "b"}, 7]}], "system": "s"}'
    found = scan(body)
    assert found is not None
    assert [bytes(part) for part in found.prompt] == [b'"s"', b'"a"', b'"b"', b"7", b"[ 1 ]"]


def test_a_salt_names_model_lora_and_kind() -> None:
    assert Features(model="é", lora="l").salt == "é\0l".encode()
    assert Features(model="m", has_ids=True).salt == b"m\0\0ids"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([key.decode() for key in KEYS]), inner),
    max_leaves=30,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from([key.decode() for key in KEYS]), values),
    st.booleans(),
    st.sampled_from([None, 1, "\t"]),
)
def test_any_json_is_read_as_parsers_read_it(value: Any, is_ascii: bool, indent: int | str | None) -> None:
    try:
        body = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode()
    except UnicodeEncodeError:
        return  # half of a surrogate pair
    Judge().judge(body)


@settings(deadline=None)
@given(st.binary() | st.from_regex(rb'\{"(text|model)": ?".{0,80}"[,}]?', fullmatch=True))
def test_any_bytes_are_refused_or_read_as_parsers_read_them(body: bytes) -> None:
    Judge().judge(body)


SPECIAL_PIECES = [
    *('\\"', "\\\\", "\\n", "\\u00e9", "\\ud83d\\ude00", "é", "中", "😀", "\x7f"),
    *("\\u4e2d\\u6587" * 12, "\\\\" * 33, '\\\\\\"' * 12, "ééé中中😀" * 6, "\\n\\u00e9\\t" * 8),
]
WRONG_PIECES = [
    *(
        b"\\x",
        b"\\",
        b"\x1f",
        b"\\\xc3\xa9",
        b"\\u12",
        b"\\u12g4",
        b"\\u00\xc2\x82",
        b"\\ud83d",
        b"\\ude00",
        b"\\ud83d\\u0041",
    ),
    *(
        b"\x80",
        b"\xc3",
        b"\xc3\xc3\xa9",
        b"\xc1\xbf",
        b"\xe4\xb8",
        b"\xe0\x9f\xbf",
        b"\xed\xa0\x80",
        b"\xf0\x8f\xbf\xbf",
    ),
    *(b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf0\x9f\x98", b"\xe4\xb8\\n", b"\xff", b"\xc3\\u0041"),
]


@pytest.mark.parametrize("piece", SPECIAL_PIECES)
def test_what_is_special_is_found_at_every_offset(piece: str) -> None:
    judge = Judge()
    for offset in range(150):
        assert judge.judge(f'{{"text": "{"x" * offset}{piece}{"y" * (offset % 70)}", "model": "m"}}'.encode())
        assert not judge.judge(f'{{"text": "{"x" * offset}{piece}'.encode())


@pytest.mark.parametrize("piece", WRONG_PIECES)
def test_what_is_wrong_is_found_at_every_offset(piece: bytes) -> None:
    judge = Judge()
    for offset in range(150):
        for before in (b"", b"\\u00e9", b"\\n", "é".encode()):
            text = before + b"x" * offset + piece + b"y" * (offset % 70)
            assert not judge.judge(b'{"text": "%b", "model": "m"}' % text)


def test_long_plain_texts_are_passed_over_up_to_what_is_special() -> None:
    judge = Judge()
    for offset in range(1100, 1500):
        assert judge.judge(b'{"text": "%b\\n", "model": "m"}' % (b"x" * offset))
        assert judge.judge(b'{"text": "%b"}' % (b"x" * offset))
        assert not judge.judge(b'{"text": "%b\n"}' % (b"x" * offset))
        assert not judge.judge(b'{"text": "%b\xff%b"}' % (b"x" * offset, b"y" * 300))


@pytest.mark.parametrize("is_wide", [False, True])
def test_either_way_reads_bodies(is_wide: bool) -> None:
    with width(is_wide=is_wide):
        found = scan(b'{"model": "m", "text": "%b\\n"}' % (b"x" * 200))
    assert found is not None
    assert [bytes(part) for part in found.prompt] == [b'"%b\\n"' % (b"x" * 200)]


def test_fuzzed_a_little() -> None:
    judge = fuzz(7, lambda judge: judge.cases >= 20_000)
    assert judge.certain > judge.cases / 4


@pytest.mark.parametrize(
    "wrong",
    [
        Features(model="m", prompt=[b'"a"'], is_stream=True),
        Features(model="m", prompt=[b'"a"', b'"b"']),
        Features(model="m", prompt=[b'"a"'], max_tokens=True),
        Features(model="m", prompt=[b'"a"'], rid=b'"r"'),
        Features(prompt=[b'"a"']),
    ],
)
def test_the_judge_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch, wrong: Features) -> None:
    monkeypatch.setattr(fuzz_body, "scan", lambda _: wrong)
    with pytest.raises(Disagreement):
        Judge().judge(b'{"model": "m", "text": "a", "max_tokens": 1}')


def test_the_judge_notices_what_a_parser_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_body, "scan", lambda _: Features())
    with pytest.raises(Disagreement, match="the decoder refuses it"):
        Judge().judge(b'{"a": "\\x"}')
