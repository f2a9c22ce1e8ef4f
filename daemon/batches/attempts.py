"""What one attempt at a line means: done, failed for good, or to be tried again. Pure.

Two kinds of trouble. What may be the line's own fault (a worker that breaks on it, an error status) costs one of its
attempts. What says nothing about the line (no worker, a full queue, a gateway that restarts) costs none: it is tried
again until the batch's window is over, and the runner sends less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

_RETRYABLE = frozenset({404, 408, 409, 425, 500, 502, 504})
"""404: a model that no worker announces at this moment"""
_CROWDED = frozenset({429, 503, 529})
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0


class Answer(msgspec.Struct, frozen=True):
    """A complete HTTP answer from the gateway."""

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The gateway's data port did not answer, or broke off."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Answered with success."""


@dataclass(frozen=True, slots=True)
class Failed:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Again:
    after_s: float
    costs_attempt: bool


Verdict = Done | Failed | Again


def judge(outcome: Answer | Unreachable, attempts: int, pauses: int, most: int, drawn: float) -> Verdict:
    """`attempts`: that the line has had, this one included; `pauses`: retries so far; `drawn`: uniform in [0, 1)."""
    if isinstance(outcome, Unreachable):
        return Again(_pause_s(pauses, drawn), costs_attempt=False)
    status = outcome.status
    if status < 300:
        return Done()
    if status in _CROWDED:
        return Again(max(outcome.retry_after_s or 0.0, _pause_s(pauses, drawn)), costs_attempt=False)
    if status in _RETRYABLE and attempts < most:
        return Again(_pause_s(pauses, drawn), costs_attempt=True)
    code, message = _told(outcome.body)
    return Failed(code or f"http_{status}", message or f"the request was answered with status {status}")


def _pause_s(pauses: int, drawn: float) -> float:
    return min(MAX_PAUSE_S, FIRST_PAUSE_S * math.pow(2.0, min(pauses, 16))) * (1.0 - 0.5 * drawn)


class _Error(msgspec.Struct):
    message: object = None
    code: object = None
    type: object = None


class _Told(msgspec.Struct):
    error: object = None
    message: object = None
    detail: object = None


def _told(body: bytes) -> tuple[str, str]:
    """(code, message) of OpenAI's error shape, or of what engines make of it; empty where it tells none."""
    try:
        told = msgspec.json.decode(body, type=_Told)
        error = msgspec.convert(told.error, _Error) if isinstance(told.error, dict) else _Error(message=told.error)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "", ""
    code = next((value for value in (error.code, error.type) if isinstance(value, str) and value), "")
    message = next((v for v in (error.message, told.message, told.detail) if isinstance(v, str) and v), "")
    return code[:128], message[:2000]


def parse_retry_after(text: str | None) -> float | None:
    """Seconds; dates, which no gateway of ours sends, are not understood."""
    if text is None or not text.isascii() or not text.isdigit():
        return None
    return min(float(text), 600.0)
