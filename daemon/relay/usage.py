"""The token counts that pass by in an answer: OpenAI's and SGLang's names, and those of Messages and Responses."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKENS = b'_tokens"'
"""In every piece of an answer that holds a count."""
CARRY_BYTES = 1024
"""Of a piece that was read before: a usage object that was cut in two is in this much and the next piece."""

_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,9})')
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d{1,9})')


@dataclass(frozen=True, slots=True)
class Usage:
    """None where the engine does not tell."""

    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


NO_USAGE = Usage()


def read_usage(data: bytes) -> Usage:
    """From the last piece of an answer that holds counts; of several the last ones stand."""
    if not data:
        return NO_USAGE
    return Usage(_last(_OUTPUT, data), _last(_PROMPT, data), _last(_CACHED, data))


def _last(pattern: re.Pattern[bytes], data: bytes) -> int | None:
    found = pattern.findall(data)
    return int(found[-1]) if found else None
