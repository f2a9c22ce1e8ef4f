"""What became of a request: `ok`, or one class of error that says whose fault it looks like.

A stream is `ok` when it came with status 200, as events that are all whole, held text, said why it finished, and ended
with `[DONE]` and the end of its message. Any other answer is `ok` when it is the JSON that was asked for, with text in
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from pointsman.daemon.bench.answer import Answer

OK = "ok"
CONNECT = "connect"
TIMEOUT = "timeout"
DISCONNECT = "disconnect"
CUT = "cut"
GENERATOR = "generator_limit"

CLASSES = {
    CONNECT: "no connection was made",
    TIMEOUT: "not ended within --timeout of being sent",
    DISCONNECT: "the connection ended before an answer began",
    CUT: "the connection ended in the middle of an answer",
    "http_NNN": "an answer with another status than 200",
    "stream_error": "a stream with an error event in it",
    "incomplete": "a stream whose message ended without [DONE] or without a finish reason",
    "empty": "an answer without any text",
    "not_a_stream": "asked for a stream, something else came",
    "wrong_answer": "status 200, but not the JSON that was asked for",
    "malformed_event": "an event that is no JSON object, or a line that is no field of an event",
    "after_done": "events after [DONE]",
    "malformed_http": "not an HTTP answer, or wrong chunk framing",
    "extra_bytes": "bytes behind the end of the answer",
    GENERATOR: "this machine had no file descriptor or port left for a connection",
}


@dataclass(slots=True, frozen=True)
class Verdict:
    """Token counts are the engine's own, None where it told none; `detail` is for people, of a failure only."""

    kind: str
    detail: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Meta(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: Any = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None


class _Document(msgspec.Struct):
    """A whole answer, or the event that tells usage, in OpenAI's or SGLang's shape."""

    choices: list[_Choice] = []
    text: str | None = None
    usage: _Usage | None = None
    meta_info: _Meta | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Document)


def judge(answer: Answer, *, wants_stream: bool, ended_by: str | None = None) -> Verdict:
    """`ended_by`: CONNECT, TIMEOUT, DISCONNECT, … when it was not the answer that ended the request."""
    if ended_by is not None:
        return Verdict(ended_by)
    if answer.problem is not None:
        return Verdict(answer.problem, _text(answer.error or answer.body))
    if answer.status != 200:
        return Verdict(f"http_{answer.status}", _text(answer.body))
    if wants_stream:
        return _judge_stream(answer)
    return _judge_document(answer.body)


def _judge_stream(answer: Answer) -> Verdict:
    if not answer.is_event_stream:
        return Verdict("not_a_stream", _text(answer.body))
    told = _decode(answer.told) if answer.told is not None else None
    has_finished = answer.has_finished
    if told is not None and told.meta_info is not None:
        has_finished = told.meta_info.finish_reason is not None
    if not answer.has_done or not has_finished:
        missing = "[DONE]" if not answer.has_done else "a finish reason"
        return Verdict("incomplete", f"{answer.events} events, but not {missing}")
    if not answer.texts:
        return Verdict("empty", f"{answer.events} events without text")
    return _counted(told)


def _judge_document(body: bytes) -> Verdict:
    document = _decode(body)
    if document is None or document.error is not None or not (document.choices or document.text is not None):
        return Verdict("wrong_answer", _text(body))
    if not document.text and not any(_has_text(choice) for choice in document.choices):
        return Verdict("empty", _text(body))
    return _counted(document)


def _decode(data: bytes) -> _Document | None:
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError:
        return None


def _has_text(choice: _Choice) -> bool:
    message = choice.message
    return bool(choice.text or (message and (message.content or message.reasoning_content or message.tool_calls)))


def _counted(document: _Document | None) -> Verdict:
    if document is None:
        return Verdict(OK)
    if document.usage is not None:
        usage = document.usage
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
        return Verdict(OK, "", usage.prompt_tokens, usage.completion_tokens, cached)
    if document.meta_info is not None:
        meta = document.meta_info
        return Verdict(OK, "", meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens)
    return Verdict(OK)


def _text(data: bytes) -> str:
    return data[:200].decode(errors="replace")
