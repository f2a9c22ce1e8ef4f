"""Input logprobs of prefill's answer go in front of decode's."""

import json
from typing import Any

import pytest

from pointsman.daemon.pd.logprobs import PromptLogprobs


def answer(lists: Any, index: int | None = None, **more: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"text": "x", "meta_info": {"id": "1", "input_token_logprobs": lists, **more}}
    return document if index is None else {**document, "index": index}


def encode(document: Any) -> bytes:
    return json.dumps(document).encode()


def logprobs(document: Any) -> Any:
    return document["meta_info"]["input_token_logprobs"]


def test_one_answer() -> None:
    prompt = PromptLogprobs(encode(answer([[-1.50, 5, None]])), is_stream=False)
    merged = prompt.merged(b'{"text": "\\u00e9", "meta_info": {"input_token_logprobs": [[-2.50, 6, null]], "n": 1.0}}')
    assert b'"\\u00e9"' in merged
    assert b"[[-1.5, 5, null],[-2.50, 6, null]]" in merged
    assert b'"n":1.0' in merged


def test_a_batch_by_position() -> None:
    prompt = PromptLogprobs(encode([answer([1]), answer([2])]), is_stream=False)
    merged = json.loads(prompt.merged(encode([answer([3]), answer([4])])))
    assert [logprobs(item) for item in merged] == [[1, 3], [2, 4]]


def test_other_lists_of_the_prompt_too() -> None:
    own: Any = {"input_top_logprobs": [[7]], "input_token_ids_logprobs": [[8]]}
    merged = json.loads(PromptLogprobs(encode(answer([1], **own)), is_stream=False).merged(encode(answer([]))))
    assert merged["meta_info"] == {"id": "1", "input_token_logprobs": [1], **own}


def test_every_event_of_a_stream() -> None:
    body = b"".join(b"data: %b\n\n" % encode(answer([1, i])) for i in range(2)) + b"data: [DONE]\n\n"
    prompt = PromptLogprobs(body, is_stream=True)
    for event in (answer([3]), answer(None)):
        assert logprobs(json.loads(prompt.merged(encode(event))))[:2] == [1, 1]


def test_a_batch_in_a_stream_by_index() -> None:
    body = b"".join(b"data: %b\n\n" % encode(answer([i], i)) for i in (1, 0))
    prompt = PromptLogprobs(body, is_stream=True)
    assert logprobs(json.loads(prompt.merged(encode(answer([9], 1))))) == [1, 9]


@pytest.mark.parametrize("body", [b"", b"{", b'{"error":1}', b"[1]", b"[DONE]", b'"text"'])
def test_what_has_no_meta_info_stays_as_it_is(body: bytes) -> None:
    assert PromptLogprobs(encode(answer([1])), is_stream=False).merged(body) == body


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff"])
def test_an_answer_that_cannot_be_read(body: bytes) -> None:
    with pytest.raises(ValueError, match="no readable meta_info"):
        PromptLogprobs(body, is_stream=False)
