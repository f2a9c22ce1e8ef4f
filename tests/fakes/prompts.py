"""Prompts: text that is never the same twice by chance, and the bodies in which clients send it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from tests.fakes.traffic import request

MODEL = "sim-model"
_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "larch")


def prompt_text(name: str, chars: int = 4000) -> str:
    """`chars` characters of words; another text for every name, from its first word on."""
    draw = random.Random(name)
    text = name
    while len(text) < chars:
        text += " " + draw.choice(_WORDS)
    return text[:chars]


def _ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def _chat(content: object) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]}


def _parts(text: str) -> list[dict[str, str]]:
    half = len(text) // 2
    return [{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]


Shape = Callable[[str], tuple[str, dict[str, Any]]]
"""Path and body (but for the model) of a request with this text."""

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "chat string": lambda text: ("/v1/chat/completions", _chat(text)),
        "chat parts": lambda text: ("/v1/chat/completions", _chat(_parts(text))),
        "prompt string": lambda text: ("/v1/completions", {"prompt": text}),
        "prompt list": lambda text: ("/v1/completions", {"prompt": [text]}),
        "prompt ids": lambda text: ("/v1/completions", {"prompt": _ids(text)}),
        "text": lambda text: ("/generate", {"text": text}),
        "input_ids": lambda text: ("/generate", {"input_ids": _ids(text)}),
        "responses": lambda text: ("/v1/responses", {"input": text}),
    }
)


def shaped(shape: str, text: str, headers: Mapping[str, str] | None = None, **fields: Any) -> bytes:
    """One POST in wire form; `fields` go into the body."""
    path, body = SHAPES[shape](text)
    return request({"model": MODEL, **body, **fields}, path, headers)
