"""The three ways to ask an engine for text, as the bytes of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import orjson

Api = Literal["chat", "completions", "generate"]
APIS: tuple[Api, ...] = get_args(Api)
PATHS: Mapping[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}
_MARK = "@@prompt@@"


@dataclass(slots=True, frozen=True)
class Ask:
    """One request. `prompt` is plain ASCII without quotes, backslashes and control characters but spaces: it goes into
    JSON as it is."""

    prompt: bytes
    max_tokens: int
    is_stream: bool
    sampling: Mapping[str, float] = field(default_factory=dict)


class Dialect:
    """Writes bodies. `extra` is merged into each, at its upper level."""

    def __init__(
        self, api: Api, model: str | None, *, ends_by_length: bool = True, extra: Mapping[str, Any] | None = None
    ) -> None:
        """`ends_by_length`: answers are as long as asked for (`ignore_eos`)."""
        self.api = api
        self.path = PATHS[api]
        self._model = model
        self._ends_by_length = ends_by_length
        self._extra = dict(extra or {})
        self._templates: dict[tuple[int, bool], tuple[bytes, bytes]] = {}

    def body(self, ask: Ask) -> bytes:
        if ask.sampling:
            before, after = self._halves(ask)
        else:  # the same but for the prompt: once is enough
            key = (ask.max_tokens, ask.is_stream)
            halves = self._templates.get(key)
            if halves is None:
                halves = self._templates[key] = self._halves(ask)
            before, after = halves
        return before + ask.prompt + after

    def _halves(self, ask: Ask) -> tuple[bytes, bytes]:
        before, _, after = orjson.dumps(self._document(ask) | self._extra).partition(_MARK.encode())
        return before, after

    def _document(self, ask: Ask) -> dict[str, Any]:
        if self.api == "generate":
            sampling: dict[str, Any] = {"max_new_tokens": ask.max_tokens, **ask.sampling}
            if self._ends_by_length:
                sampling["ignore_eos"] = True
            return {"text": _MARK, "sampling_params": sampling, "stream": ask.is_stream}
        prompt: dict[str, Any] = (
            {"messages": [{"role": "user", "content": _MARK}]} if self.api == "chat" else {"prompt": _MARK}
        )
        document: dict[str, Any] = {"model": self._model} if self._model is not None else {}
        document |= prompt | {"max_tokens": ask.max_tokens, "stream": ask.is_stream} | dict(ask.sampling)
        if ask.is_stream:
            document["stream_options"] = {"include_usage": True}
        if self._ends_by_length:
            document["ignore_eos"] = True
        return document


class Wire:
    """Puts the head of a request before a body."""

    def __init__(self, host: str, path: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Raises ValueError for a header that cannot be sent."""
        lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
        for name, value in headers:
            if not name or not name.isascii() or any(char in f"{name}{value}" for char in "\r\n\0") or " " in name:
                raise ValueError(f"{name!r} cannot be sent as a header")
            lines.append(f"{name}: {value}")
        self._head = ("\r\n".join(lines) + "\r\nContent-Length: ").encode()

    def request(self, body: bytes) -> bytes:
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
