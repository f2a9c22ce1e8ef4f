"""A stream that broke, continued by another worker: what was told so far, what to ask next, how to go on telling.

Theory of operation. A `Transcript` stands between the workers' payload and the client for as long as an answer may have
to be continued. It passes on whole events only, so that at any moment the client has exactly the text that the
transcript has. When the worker fails, `resume` closes the run and builds the request of the next one:

    chat          the messages and one of the assistant's with the text so far; `continue_final_message` without
                  `add_generation_prompt`: vLLM, SGLang and llama.cpp then go on writing this very message
    completions   the prompt and the text so far

both with the budget of tokens that is left. The next run's events are told as if they were the first one's: its `id`
and `created`, no second role, and a `usage` that is the sum of both.

Chat templates may trim a message, so the text goes there without the blanks at its end. The model writes these again
(with greedy decoding the same), and as much of them as the client already has is taken away from what follows. A text
of nothing but blanks is no message at all: the request is asked anew as it was.

Not every request can be continued: `Resumable.read` says which, the events themselves say when no longer (several
choices, calls of tools, reasoning, what cannot be read). Such a stream is passed on unchanged to its end.

Tokens are counted as the worker tells them, where its events have `usage`; otherwise an event with text is one.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from msgspec import Raw

from pointsman.daemon.relay.framing import FramingError
from pointsman.daemon.relay.gate import error_told
from pointsman.daemon.resilience.retry import Outcome

MAX_EVENT_BYTES = 1 << 20
MAX_TEXT_CHARS = 1 << 20
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DONE_EVENT = b"data: [DONE]\n\n"
_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")
_LONGEST_END = 4
_NOTHING = frozenset((b"null", b"false", b"[]", b"{}", b'""'))
_ONE = frozenset((b"null", b"1"))

_BARRED = (
    # more than text is to come
    *("tools", "functions", "audio", "logprobs", "prompt_logprobs", "echo", "return_token_ids"),
    # the text must follow a grammar, which would begin anew in its middle
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern"),
    *("structured_outputs", "structural_tag", "grammar", "json_schema", "regex", "ebnf"),
    # the text is not simply what follows the prompt
    *("suffix", "prompt_embeds", "use_beam_search", "truncate_prompt_tokens"),
    # one prefill worker holds the prompt for one decode worker
    *("kv_transfer_params", "bootstrap_host", "bootstrap_room"),
)
_BUDGETS = ("max_completion_tokens", "max_tokens", "n_predict")
"""The first one that is there counts."""

_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.encode


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Typed(msgspec.Struct):
    type: str


class _Speech(msgspec.Struct):
    role: str
    content: Raw = Raw(b"null")


@dataclass(frozen=True, slots=True)
class Resumable:
    """What must be known of a request whose stream can be continued."""

    is_chat: bool
    wants_usage: bool
    budget: int | None
    """tokens; None: as many as the model will"""

    @classmethod
    def read(cls, path: str, body: bytes) -> Resumable | None:
        """None: its stream cannot be continued."""
        if path not in (CHAT, COMPLETIONS):
            return None
        try:
            fields = _decode_fields(body)
            budget = _budget_of(fields)
            if not _is_plain(fields) or not _takes_a_prefix(path, fields, budget):
                return None
            options = fields.get("stream_options")
            wants_usage = options is not None and msgspec.json.decode(options, type=_StreamOptions | None)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return cls(path == CHAT, bool(wants_usage and wants_usage.include_usage), budget)

    def body(self, original: bytes, text: str, spent: int) -> bytes | None:
        """The request that goes on after `text` of `spent` tokens; None: no token is left.

        Values that are not concerned stand in it as they stood in `original`.
        """
        if self.budget is not None and spent >= self.budget:
            return None
        if not text:
            return original
        fields = _decode_fields(original)
        for name in (*_BUDGETS, "min_tokens"):
            most = msgspec.json.decode(fields.get(name, b"null"))
            if isinstance(most, int) and most > 0:
                fields[name] = _raw(max(most - spent, 0 if name == "min_tokens" else 1))
        if self.is_chat:
            fields["messages"] = _raw(_messages_with(fields, text))
            fields["continue_final_message"] = Raw(b"true")
            fields["add_generation_prompt"] = Raw(b"false")
        else:
            fields["prompt"] = _raw(_prompt_of(fields["prompt"]) + text)
        return _encode(fields)


def _raw(value: object) -> Raw:
    return Raw(_encode(value))


def _is_plain(fields: dict[str, Raw]) -> bool:
    """Whether what is asked for is one text and nothing else."""
    for name in _BARRED:
        value = fields.get(name)
        if value is not None and bytes(value) not in _NOTHING:
            return False
    if any(bytes(fields.get(name, b"1")) not in _ONE for name in ("n", "best_of")):
        return False
    form = msgspec.json.decode(fields.get("response_format", b"null"), type=_Typed | None)
    return form is None or form.type == "text"


def _budget_of(fields: dict[str, Raw]) -> int | None:
    for name in _BUDGETS:
        most = msgspec.json.decode(fields.get(name, b"null"), type=int | None)
        if most is not None:
            return most if most > 0 else None
    return None


def _takes_a_prefix(path: str, fields: dict[str, Raw], budget: int | None) -> bool:
    if path == COMPLETIONS:
        # without one, engines stop after a number of tokens that only they know
        return budget is not None and _prompt_of(fields.get("prompt", Raw(b"null"))) is not None
    messages = _decode_items(fields.get("messages", b"[]"))
    is_continuing = bytes(fields.get("continue_final_message", b"false")) == b"true"
    if not messages:
        return False
    last = msgspec.json.decode(messages[-1], type=_Speech)
    if last.role == "assistant":
        return is_continuing and isinstance(msgspec.json.decode(last.content), str)
    return not is_continuing and bytes(fields.get("add_generation_prompt", b"true")) != b"false"


def _prompt_of(prompt: Raw) -> Any:
    """The text, None if it is none: token ids, or several prompts."""
    value = msgspec.json.decode(prompt)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None


def _messages_with(fields: dict[str, Raw], text: str) -> list[Raw]:
    messages = _decode_items(fields["messages"])
    last = _decode_fields(messages[-1])
    if bytes(last["role"]) == b'"assistant"':
        last["content"] = _raw(msgspec.json.decode(last["content"]) + text)
        messages[-1] = _raw(last)
    else:
        messages.append(_raw({"role": "assistant", "content": text}))
    return messages


class Transcript:
    """What the client was told of one answer, over all runs."""

    __slots__ = (
        "_blanks",
        "_created",
        "_has_last_usage",
        "_has_role",
        "_id",
        "_is_done",
        "_is_finished",
        "_owed",
        "_partial",
        "_prompt_tokens",
        "_request",
        "_text",
        "_tokens",
        "_told_tokens",
        "failure",
        "is_resumable",
        "runs",
        "spent",
    )

    def __init__(self, request: Resumable) -> None:
        self._request = request
        self.is_resumable = True
        self.runs = 0
        """that broke"""
        self.spent = 0
        """tokens of these"""
        self.failure: Outcome | None = None
        """The worker has told an error; that event and what follows it are withheld."""
        self._text = io.StringIO()
        self._partial = b""
        self._id: object = None
        self._created: object = None
        self._has_role = self._is_finished = self._has_last_usage = self._is_done = False
        self._prompt_tokens: int | None = None
        self._tokens = 0
        """events with text in this run"""
        self._told_tokens: int | None = None
        self._blanks = 0
        """of `_tokens` the last ones, which are nothing but blanks"""
        self._owed = ""
        """blanks that the client has, and that this run is to begin with"""

    @property
    def is_whole(self) -> bool:
        """The worker said that its text has ended."""
        return self._is_finished or self._is_done

    @property
    def is_complete(self) -> bool:
        """The client has been told all that it asked for, but perhaps not `[DONE]`."""
        return self._is_done or (self._is_finished and (self._has_last_usage or not self._request.wants_usage))

    @property
    def tokens(self) -> int:
        """Of all runs."""
        return self.spent + (self._tokens if self._told_tokens is None else self._told_tokens)

    @property
    def size_bytes(self) -> int:
        """Memory that the text takes, about."""
        return 4 * self._text.tell()

    # --- what the worker says

    def feed(self, data: bytes) -> bytes:
        """Payload as it comes; returns the whole events that go to the client. Raises FramingError."""
        start = 0
        search_from = max(len(self._partial) - _LONGEST_END + 1, 0)
        if self._partial:
            data = self._partial + data
        passed: list[bytes] = []
        while end := _END_OF_EVENT.search(data, max(start, search_from)):
            event = self._take(data[start : end.end()])
            if self.failure is not None:
                break
            passed.append(event)
            start = end.end()
        self._partial = data[start:]
        if len(self._partial) > MAX_EVENT_BYTES and self.failure is None:
            raise FramingError("an event of the worker's stream is too long")
        return b"".join(passed)

    @property
    def withheld(self) -> bytes:
        """What has come and is not passed on: of an event a piece, or an error and what follows it."""
        return self._partial

    def rest(self) -> bytes:
        """The worker has ended its stream: an event without its end, as it is."""
        rest, self._partial = self._partial, b""
        return self._take(rest) if rest else b""

    def ending(self) -> bytes:
        """What is still to be told of a complete answer."""
        return b"" if self._is_done else DONE_EVENT

    def give_up(self) -> None:
        """It will not be continued: an error goes to the client like any event."""
        self.is_resumable = False
        self._partial, self.failure = b"", None
        self._text = io.StringIO()

    def _take(self, event: bytes) -> bytes:
        """As it goes to the client."""
        if not (self.is_resumable or self.runs):
            return event
        data = data_of(event)
        if data is None or data == b"[DONE]":
            self._is_done = self._is_done or data is not None
            return event
        try:
            told = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.give_up()
            return event
        choices = told.get("choices") if isinstance(told, dict) else None
        if not isinstance(choices, list):
            error = error_told(told, is_named=event.startswith(b"event: error"))
            if error is not None and self.is_resumable:
                self.failure = error
            else:
                self.give_up()
            return event
        if not self.runs and self._id is None:
            self._id, self._created = told.get("id"), told.get("created")
        self._take_usage(told)
        is_news = [self._take_choice(choice) for choice in choices]
        if not self.runs:
            return event
        if is_news and not any(is_news) and not told.get("usage"):
            return b""
        return with_data(event, orjson.dumps(self._as_the_first(told)))

    def _take_choice(self, choice: Any) -> bool:
        """Notes it, and takes out what the client already has; False: that was all of it."""
        place = self._place_of(choice)
        if place is None:
            self.give_up()
            return True
        key = "content" if self._request.is_chat else "text"
        text, role = place.get(key), place.get("role")
        is_last = bool(choice.get("finish_reason"))
        is_known = False
        if isinstance(text, str) and (text or not (role or is_last)):
            self._tokens += 1
            self._blanks = 0 if text.strip() else self._blanks + 1
            new = self._without_owed(text)
            is_known = new != text and not new
            place[key] = new
            self._add(new)
        elif text:
            self.give_up()
        if role:
            if self.runs and self._has_role:
                del place["role"]
                is_known = is_known or not text
            self._has_role = True
        self._is_finished = self._is_finished or is_last
        return is_last or not is_known

    def _place_of(self, choice: Any) -> dict[str, Any] | None:
        """Where its text is; None: it has more than text."""
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            return None
        if not self._request.is_chat:
            return choice
        delta = choice.setdefault("delta", {})
        if not isinstance(delta, dict) or any(delta[name] for name in delta if name not in ("role", "content")):
            return None
        return delta

    def _without_owed(self, text: str) -> str:
        owed = self._owed
        if not owed:
            return text
        same = 0
        while same < min(len(owed), len(text)) and owed[same] == text[same]:
            same += 1
        self._owed = owed[same:] if same == len(text) else ""
        return text[same:]

    def _add(self, text: str) -> None:
        if self.is_resumable:
            self._text.write(text)
            if self._text.tell() > MAX_TEXT_CHARS:
                self.give_up()

    def _take_usage(self, told: dict[str, Any]) -> None:
        """Notes it, and makes it that of all runs."""
        usage = told.get("usage")
        if not isinstance(usage, dict):
            return
        # what comes with the last text or after it
        self._has_last_usage = self._is_finished or any(
            isinstance(choice, dict) and choice.get("finish_reason") for choice in told["choices"]
        )
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(prompt, int) and isinstance(completion, int)):
            return
        self._told_tokens = completion
        if not self.runs:
            self._prompt_tokens = prompt
            return
        told_first = self._prompt_tokens
        prompt = max(prompt - self.spent, 0) if told_first is None else told_first  # this one's held the text so far
        completion += self.spent
        usage |= {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            details["cached_tokens"] = min(details["cached_tokens"], prompt)

    def _as_the_first(self, told: dict[str, Any]) -> dict[str, Any]:
        for name, value in (("id", self._id), ("created", self._created)):
            if name in told and value is not None:
                told[name] = value
        return told

    # --- when it breaks

    def resume(self, original: bytes) -> bytes | None:
        """The run is over before its end: the body of the request that goes on; None: there is no going on.

        May be asked again when that request came to nothing.
        """
        if not self.is_resumable or self.is_whole:
            return None
        text = self._text.getvalue()
        kept, blanks = text, 0
        if self._request.is_chat:
            kept, blanks = text.rstrip(), self._blanks
        self.runs += 1
        self.spent = max(self.tokens - blanks, self.spent)
        self._owed = text[len(kept) :]
        self._partial, self.failure = b"", None
        self._tokens, self._told_tokens, self._blanks = 0, None, 0
        return self._request.body(original, kept, self.spent)


def data_of(event: bytes) -> bytes | None:
    """The joined data of a server-sent event; None: it has none."""
    if event.startswith(b"data: ") and b"\ndata" not in event:
        return event[6 : event.index(b"\n", 6)].rstrip(b"\r") if b"\n" in event else event[6:]
    found = [
        line[5:].removeprefix(b" ") for line in event.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data:")
    ]
    return b"\n".join(found) if found else None


def with_data(event: bytes, data: bytes) -> bytes:
    """The same event with other data (of one line)."""
    lines: list[bytes] = []
    for line in event.splitlines(keepends=True):
        if not line.startswith(b"data:"):
            lines.append(line)
        elif data:
            lines.append(b"data: " + data + line[len(line.rstrip(b"\r\n")) :])
            data = b""
    return b"".join(lines)
