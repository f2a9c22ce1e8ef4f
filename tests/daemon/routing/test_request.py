"""What is found in a request body: model, lengths, and the prompt in all its shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.request import form_features, form_models, id_bytes, json_features
from pointsman.daemon.shm.prefix import HashChain


def text_of(body: Any) -> bytes:
    """The prompt as the index sees it, strings resolved."""
    features = json_features(json.dumps(body).encode())
    found = b""
    for span in features.prompt:
        raw = bytes(memoryview(span))
        found += json.loads(raw).encode() if not features.has_ids and raw[:1] == b'"' else raw
    return found


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, b"ab"),
        ({"messages": [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}, b"ab"),
        ({"messages": [{"content": None}, {"content": "b"}]}, b"b"),
        ({"messages": [{"role": "user"}]}, b""),
        ({"prompt": "abc"}, b"abc"),
        ({"prompt": ["ab", "c"]}, b"abc"),
        ({"prompt": [1, 2]}, id_bytes([1, 2])),
        ({"prompt": [[1], [2, 3]]}, id_bytes([1, 2, 3])),
        ({"text": "abc"}, b"abc"),
        ({"text": ["ab", "c"]}, b"abc"),
        ({"input_ids": [7, 8]}, id_bytes([7, 8])),
        ({"input_ids": [[7], [8]]}, id_bytes([7, 8])),
        ({"input": "abc", "instructions": "do "}, b"do abc"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]}, b"q"),
        ({"system": "s", "messages": [{"role": "user", "content": "u"}]}, b"su"),
        ({"system": [{"type": "text", "text": "s"}], "messages": []}, b"s"),
        ({"messages": [], "prompt": "not both"}, b""),
        ({"prompt": None}, b""),
        ({"prompt": []}, b""),
        ({}, b""),
    ],
)
def test_prompts(body: Any, text: bytes) -> None:
    assert text_of(body) == text


def test_images_and_tool_calls_count_as_they_stand() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    one = text_of({"messages": [{"content": [image]}]})
    assert b"base64,AAAA" in one
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    assert json.loads(text_of({"messages": [{"content": None, "tool_calls": calls}]})) == calls


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "abc"},
        {"messages": [1, 2]},
        {"messages": {"a": 1}},
        {"prompt": {"a": 1}},
        {"prompt": [[None]]},
        {"input_ids": [2**40]},
        {"input_ids": ["a", 1]},
        {"messages": [{"content": 7}]},
        {"messages": [{"content": [7]}]},
        {"messages": [{"content": [{"text": 7}]}]},
        {"sampling_params": 7, "text": "x"},
    ],
)
def test_what_is_not_a_prompt_is_for_the_worker_to_refuse(body: Any) -> None:
    assert json_features(json.dumps(body).encode()).model == ""


def test_lengths_and_salts() -> None:
    assert json_features(b'{"max_tokens": 5}').max_tokens == 5
    assert json_features(b'{"max_tokens": 5, "max_completion_tokens": 6}').max_tokens == 6
    assert json_features(b'{"sampling_params": {"max_new_tokens": 7}}').max_tokens == 7
    assert json_features(b'{"max_tokens": "5"}').max_tokens is None
    salts = [json_features(json.dumps(body).encode()).salt for body in BODIES_THAT_DIFFER]
    assert len(set(salts)) == len(salts)


BODIES_THAT_DIFFER: list[Any] = [
    {"text": "x"},
    {"text": "x", "model": "a"},
    {"text": "x", "model": "a", "lora_path": "b"},
    {"text": "x", "lora_path": "a"},
    {"model": "a", "input_ids": [1]},
]


@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"{", b'{"a": }', b"\xff", b'{"model": "\xff"}'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        json_features(body)
    assert caught.value.status == 400


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["model", "messages", "content", "prompt", "text", "input_ids", "input", "system", "x"]), x,
), max_leaves=20))  # fmt: skip
def test_anything_is_read_or_refused(value: Any) -> None:
    try:
        json_features(json.dumps(value).encode())
    except RequestError as error:
        assert error.status == 400  # noqa: PT017 - not raising is as good
        assert not isinstance(value, dict)


@given(st.text(), st.booleans(), st.integers(0, 3))
def test_however_a_string_is_escaped_it_is_the_same_text(text: str, ascii_only: bool, cuts: int) -> None:
    raw = json.dumps(text, ensure_ascii=ascii_only)
    spans = [json.dumps(part, ensure_ascii=ascii_only).encode() for part in _cut(text, cuts)]
    one, other = HashChain(1, 16), HashChain(1, 16)
    one.load_json(spans, "salt")
    other.load(text.encode("utf-8", "surrogatepass"), "salt")
    assert one.hash_list() == other.hash_list()
    assert one.total_chars == other.total_chars
    assert one.load_json([raw.replace("/", "\\/").encode()], "salt").hash_list() == other.hash_list()


def _cut(text: str, cuts: int) -> list[str]:
    size = len(text) // (cuts + 1) + 1
    return [text[start : start + size] for start in range(0, len(text), size)] or [""]


def test_a_form_names_its_model() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
    assert form_features(form).model == "whisper"
    assert form_features(b"--x--").model == ""


def test_a_form_whose_model_is_not_the_last_part() -> None:
    """Once the next part's content was taken for it."""
    file = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    one = b'--x\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\nwhisper\r\n'
    two = b"--x\r\ncontent-disposition: form-data; name=model\r\n\r\nother\r\n"
    assert form_features(one + file + b"--x--\r\n").model == "whisper"
    assert form_features(two + file + b"--x--\r\n").model == "other"
    assert form_models(file + one + file + two + b"--x--\r\n") == ["whisper", "other"]
    assert form_models(file + b"--x--\r\n") == []
