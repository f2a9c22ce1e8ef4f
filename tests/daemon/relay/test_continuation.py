"""Which requests can be continued, how the rest is asked for, and that two runs are told as one."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.relay.continuation import (
    CHAT,
    COMPLETIONS,
    DONE_EVENT,
    MAX_EVENT_BYTES,
    MAX_TEXT_CHARS,
    Resumable,
    Transcript,
    data_of,
    with_data,
)
from pointsman.daemon.relay.framing import FramingError
from pointsman.daemon.resilience.retry import OutcomeKind

USER = {"role": "user", "content": "hi"}
CHAT_BODY: dict[str, Any] = {"model": "m", "messages": [USER], "stream": True}
COMPLETION_BODY: dict[str, Any] = {"model": "m", "prompt": "hi", "max_tokens": 9, "stream": True}


def resumable(body: dict[str, Any] | bytes, path: str = CHAT) -> Resumable | None:
    return Resumable.read(path, body if isinstance(body, bytes) else json.dumps(body).encode())


def rest_of(body: dict[str, Any], text: str, spent: int, path: str = CHAT) -> Any:
    request = resumable(body, path)
    assert request is not None
    asked = request.body(json.dumps(body).encode(), text, spent)
    return None if asked is None else json.loads(asked)


# --- which requests


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "best_of": None, "logprobs": False, "tools": [], "response_format": {"type": "text"}},
        {"temperature": 0.7, "seed": 3, "stop": ["\n"], "top_k": 5, "stream_options": {"include_usage": True}},
        {"max_tokens": 5, "max_completion_tokens": None, "response_format": None, "stream_options": None},
        {"messages": [USER, {"role": "assistant", "content": "a"}, USER]},
        {"messages": [USER, {"role": "assistant", "content": "a"}], "continue_final_message": True},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
    ],
)
def test_chats_that_can_be_continued(fields: dict[str, Any]) -> None:
    assert resumable(CHAT_BODY | fields) is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"guided_regex": "a+"},
        {"structured_outputs": {"choice": ["a"]}},
        {"echo": True},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"audio": {"voice": "x"}},
        {"max_tokens": "many"},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"content": "of nobody"}]},
        {"messages": [USER, {"role": "assistant", "content": "a"}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [USER, {"role": "assistant", "content": None}], "continue_final_message": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ],
)
def test_chats_that_cannot(fields: dict[str, Any]) -> None:
    assert resumable(CHAT_BODY | fields) is None


@pytest.mark.parametrize("fields", [{}, {"prompt": ["hi"]}, {"logprobs": None, "best_of": 1, "suffix": ""}])
def test_completions_that_can_be_continued(fields: dict[str, Any]) -> None:
    assert resumable(COMPLETION_BODY | fields, COMPLETIONS) is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},  # 16 at one engine, all there is at another
        {"logprobs": 0},
        {"prompt": [1, 2]},
        {"prompt": ["a", "b"]},
        {"prompt": None},
        {"suffix": "end"},
        {"best_of": 3},
    ],
)
def test_completions_that_cannot(fields: dict[str, Any]) -> None:
    assert resumable(COMPLETION_BODY | fields, COMPLETIONS) is None


def test_other_paths_and_nonsense_cannot() -> None:
    assert resumable(COMPLETION_BODY, "/v1/responses") is None
    for nonsense in (b"", b"[]", b"{", b'{"messages": [1], "stream": true}', b'{"prompt": "\\ud800", "max_tokens": 3}'):
        assert resumable(nonsense) is None
        assert resumable(nonsense, COMPLETIONS) is None


# --- the request for the rest


def test_a_chat_goes_on_with_its_own_last_message() -> None:
    asked = rest_of(CHAT_BODY | {"max_tokens": 10, "min_tokens": 4, "temperature": 0}, 'Once "upon"', 3)
    assert asked == CHAT_BODY | {
        "messages": [USER, {"role": "assistant", "content": 'Once "upon"'}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 7,
        "min_tokens": 1,
        "temperature": 0,
    }


def test_a_prefix_of_the_clients_own_grows() -> None:
    body = CHAT_BODY | {
        "messages": [USER, {"role": "assistant", "content": "Sure: ", "name": "x"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    asked = rest_of(body, "once", 1)
    assert asked == body | {"messages": [USER, {"role": "assistant", "content": "Sure: once", "name": "x"}]}


@pytest.mark.parametrize("prompt", ["Tell: ", ["Tell: "]])
def test_a_completion_goes_on_with_its_prompt(prompt: Any) -> None:
    assert rest_of(COMPLETION_BODY | {"prompt": prompt}, "once ", 2, COMPLETIONS) == COMPLETION_BODY | {
        "prompt": "Tell: once ",
        "max_tokens": 7,
    }


def test_both_names_of_the_budget() -> None:
    asked = rest_of(CHAT_BODY | {"max_tokens": 100, "max_completion_tokens": 5}, "a", 4)
    assert (asked["max_tokens"], asked["max_completion_tokens"]) == (96, 1)
    assert rest_of(CHAT_BODY | {"max_tokens": 100, "max_completion_tokens": 5}, "a", 5) is None
    assert "max_tokens" not in rest_of(CHAT_BODY, "a", 5000)


def test_other_values_stay_as_they_were_written() -> None:
    body = b'{"messages":[{"role":"user","content":"\\u00e4 \\/"}], "seed":18446744073709551617, "top_p":1e0,"x":[ 1 ]}'
    request = resumable(body)
    assert request is not None
    asked = request.body(body, "a", 1)
    assert asked is not None
    for piece in (b'"\\u00e4 \\/"', b"18446744073709551617", b"1e0", b"[ 1 ]"):
        assert piece in asked


# --- events

# a model's text: tokens with blanks at either end, quotes, escapes, letters of two, three and four bytes
tokens = st.lists(st.text(st.sampled_from(' \n"\\aé中🙂'), min_size=1, max_size=4), min_size=1, max_size=12)
styles = st.sampled_from(["plain", "escaped", "crlf", "lines", "named", "commented"])


def event_of(document: dict[str, Any], style: str = "plain") -> bytes:
    data = json.dumps(document, ensure_ascii=style == "escaped").encode()
    if style == "lines":  # JSON may be broken between its parts
        data = json.dumps(document, ensure_ascii=False, indent=1).encode()
        return b"".join(b"data:" + line + b"\n" for line in data.split(b"\n")) + b"\n"
    if style == "crlf":
        return b"data: " + data + b"\r\n\r\n"
    if style == "named":
        return b"event: message\nid: 7\ndata: " + data + b"\n\n"
    return (b": still here\n\n" if style == "commented" else b"") + b"data: " + data + b"\n\n"


def chunk(run: int, delta: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": f"run-{run}", "created": run, "object": "chat.completion.chunk", "choices": [choice], **more}


def run_of(run: int, texts: list[str], style: str = "plain", *, usage: dict[str, int] | None = None) -> list[bytes]:
    events = [event_of(chunk(run, {"role": "assistant", "content": ""}), style)]
    events += [event_of(chunk(run, {"content": text}), style) for text in texts]
    events.append(event_of(chunk(run, {}, "stop"), style))
    if usage is not None:
        events.append(event_of({"id": f"run-{run}", "created": run, "choices": [], "usage": usage}, style))
    return [*events, DONE_EVENT]


def transcript(body: dict[str, Any] = CHAT_BODY, path: str = CHAT) -> Transcript:
    request = resumable(body, path)
    assert request is not None
    return Transcript(request)


def fed(story: Transcript, wire: bytes, cuts: list[int]) -> bytes:
    """In pieces that end at these places."""
    places = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    return b"".join(story.feed(wire[start:end]) for start, end in pairwise(places))


def documents(wire: bytes) -> list[dict[str, Any]]:
    assert wire == b"" or wire.endswith((b"\n\n", b"\r\n\r\n")), "half an event went out"
    found = [data_of(event) for event in wire.replace(b"\r\n", b"\n").split(b"\n\n")]
    return [json.loads(data) for data in found if data not in (None, b"[DONE]")]


def text_of(wire: bytes) -> str:
    choices = [choice for document in documents(wire) for choice in document["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@given(tokens, styles, st.lists(st.integers(0, 10_000), max_size=30))
def test_a_run_that_does_not_break_is_passed_on_as_it_is(texts: list[str], style: str, cuts: list[int]) -> None:
    wire = b"".join(run_of(1, texts, style))
    story = transcript()
    assert fed(story, wire, cuts) == wire
    assert (story.is_whole, story.is_complete, story.is_resumable) == (True, True, True)
    assert story.tokens == len(texts)
    assert story.resume(b"") is None
    assert story.ending() == story.rest() == b""


@given(tokens, styles, styles, st.integers(0, 10_000), st.lists(st.integers(0, 10_000), max_size=30))
def test_two_runs_are_told_as_one(texts: list[str], style: str, other: str, broken_at: int, cuts: list[int]) -> None:
    """Wherever the first one breaks: the second worker is asked for what is missing, and says it in its own way."""
    whole = "".join(texts)
    first = b"".join(run_of(1, texts, style)[:-2])  # without its finish
    body = CHAT_BODY | {"max_tokens": len(texts) + 1, "stream_options": {"include_usage": True}}
    original = json.dumps(body).encode()
    story = transcript(body)
    told = fed(story, first[: broken_at % (len(first) + 1)], cuts)
    had = text_of(told)

    asked = story.resume(original)
    assert asked is not None
    document = json.loads(asked)
    prefix = document["messages"][-1]["content"] if len(document["messages"]) == 2 else ""
    assert prefix == had.rstrip()
    assert whole.startswith(prefix)
    missing = list(whole[len(prefix) :])  # a token is a letter there
    assert document["max_tokens"] == body["max_tokens"] - story.spent
    usage = {"prompt_tokens": 10 + story.spent, "completion_tokens": len(missing), "total_tokens": 0}
    told += fed(story, b"".join(run_of(2, missing, other, usage=usage)), cuts)

    assert text_of(told) == whole
    found = documents(told)
    assert len({document["id"] for document in found}) == len({document["created"] for document in found}) == 1
    assert sum("role" in choice["delta"] for document in found for choice in document["choices"]) == 1
    assert sum(bool(choice["finish_reason"]) for document in found for choice in document["choices"]) == 1
    assert told.count(b"data: [DONE]") == 1
    completion = story.spent + len(missing)
    assert found[-1]["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": completion,
        "total_tokens": 10 + completion,
    }
    assert story.is_complete


@given(tokens, st.lists(st.integers(0, 10_000), min_size=2, max_size=4))
def test_any_number_of_runs(texts: list[str], breaks: list[int]) -> None:
    whole = "".join(texts)
    story = transcript()
    original = json.dumps(CHAT_BODY).encode()
    told, missing = b"", texts
    for run, broken_at in enumerate(breaks):
        wire = b"".join(run_of(run, missing)[:-2])
        told += story.feed(wire[: broken_at % (len(wire) + 1)])
        asked = story.resume(original)
        assert asked is not None
        assert story.resume(original) == asked, "the attempt before it came to nothing"
        messages = json.loads(asked)["messages"]
        missing = list(whole[len(messages[1]["content"]) if len(messages) == 2 else 0 :])
    told += story.feed(b"".join(run_of(9, missing)))
    assert text_of(told) == whole


def test_a_completion() -> None:
    def event(run: int, text: str, finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "text": text, "finish_reason": finish}
        return event_of({"id": f"run-{run}", "created": run, "choices": [choice], **more})

    story = transcript(COMPLETION_BODY, COMPLETIONS)
    told = story.feed(event(1, " a") + event(1, "b "))
    asked = story.resume(json.dumps(COMPLETION_BODY).encode())
    assert asked is not None
    assert json.loads(asked) == COMPLETION_BODY | {"prompt": "hi ab ", "max_tokens": 7}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}
    told += story.feed(event(2, " c", "length", usage=usage))
    found = documents(told)
    assert [document["choices"][0]["text"] for document in found] == [" a", "b ", " c"]
    assert {document["id"] for document in found} == {"run-1"}
    assert found[-1]["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert story.ending() == DONE_EVENT, "all but the mark is there"


def test_usage_that_is_told_with_every_event_counts() -> None:
    """More exact than events: two tokens came in one."""
    story = transcript(CHAT_BODY | {"max_tokens": 10})
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    story.feed(event_of(chunk(1, {"role": "assistant", "content": "ab"}, usage=usage)))
    asked = story.resume(json.dumps(CHAT_BODY | {"max_tokens": 10}).encode())
    assert asked is not None
    assert json.loads(asked)["max_tokens"] == 8
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    told = documents(story.feed(event_of(chunk(2, {"content": "c"}, usage=usage))))
    assert told[0]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@pytest.mark.parametrize(
    "event",
    [
        event_of(chunk(1, {"tool_calls": [{"index": 0}]})),
        event_of(chunk(1, {"reasoning_content": "hm"})),
        event_of(chunk(1, {"content": ["parts"]})),
        event_of({"id": "x", "choices": [{"index": 1, "delta": {"content": "b"}}]}),
        event_of({"id": "x", "choices": ["what"]}),
        event_of({"id": "x", "object": "something else"}),
        b"data: what\n\n",
        b"data: 1\n\n",
        b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n',
    ],
)
def test_what_is_not_plain_text_ends_it(event: bytes) -> None:
    """The stream itself goes on as it is."""
    story = transcript()
    before = event_of(chunk(1, {"content": "a"}))
    assert story.feed(before + event + before) == before + event + before
    assert not story.is_resumable
    assert story.size_bytes == 0
    assert story.resume(json.dumps(CHAT_BODY).encode()) is None


def test_a_stream_that_has_said_why_it_ended_is_not_continued() -> None:
    story = transcript(CHAT_BODY | {"stream_options": {"include_usage": True}})
    story.feed(event_of(chunk(1, {"content": "a"})) + event_of(chunk(1, {}, "stop")))
    assert story.resume(json.dumps(CHAT_BODY).encode()) is None
    assert not story.is_complete, "the client waits for its usage"


@pytest.mark.parametrize("event", [b'data: {"error": {"message": "x", "code": 500}}\n\n'])
def test_an_error_in_the_middle_is_withheld(event: bytes) -> None:
    story = transcript()
    before = event_of(chunk(1, {"content": "a"}))
    assert story.feed(before + event + DONE_EVENT) == before
    assert story.failure is not None
    assert (story.failure.kind, story.failure.status) == (OutcomeKind.ERROR_EVENT, 500)
    withheld = story.withheld
    assert withheld == event + DONE_EVENT
    story.give_up()
    assert story.feed(withheld) == withheld


def test_an_error_before_another_run_is_gone() -> None:
    story = transcript()
    story.feed(event_of(chunk(1, {"content": "a"})) + b'data: {"error": "x"}\n\n')
    assert story.resume(json.dumps(CHAT_BODY).encode()) is not None
    assert text_of(story.feed(b"".join(run_of(2, ["b"])))) == "b"


def test_what_is_kept_is_bounded() -> None:
    story = transcript()
    with pytest.raises(FramingError):
        story.feed(b"data: " + b"x" * MAX_EVENT_BYTES)
    story = transcript()
    event = event_of(chunk(1, {"content": "x" * (MAX_TEXT_CHARS // 2)}))
    assert story.feed(event + event) == event + event
    assert story.is_resumable
    story.feed(event)
    assert (story.is_resumable, story.size_bytes) == (False, 0)


def test_an_event_without_its_end_goes_out_with_the_stream() -> None:
    story = transcript()
    assert story.feed(b"data: [DONE]\n") == b""
    assert story.rest() == b"data: [DONE]\n"
    assert story.is_complete


@pytest.mark.parametrize(
    ("event", "data", "changed"),
    [
        (b"data: a\n\n", b"a", b"data: X\n\n"),
        (b"data:a\r\n\r\n", b"a", b"data: X\r\n\r\n"),
        (b"data: a\ndata:  b\nid: 1\n\n", b"a\n b", b"data: X\nid: 1\n\n"),
        (b"id: 1\ndata: a\n\n", b"a", b"id: 1\ndata: X\n\n"),
        (b"data: a", b"a", b"data: X"),
        (b": data: a\n\n", None, b": data: a\n\n"),
    ],
)
def test_data_of_an_event(event: bytes, data: bytes | None, changed: bytes) -> None:
    assert data_of(event) == data
    assert with_data(event, b"X") == changed
