"""The first-chunk gate: whether the first event of a stream says that the request failed.

Engines that fail a request after their head is out (a full cache, a broken transfer) tell it as an event of a
200 answer. As long as nothing has gone to the client such a stream can be retried like an error status.
"""

from __future__ import annotations

import orjson

from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind

MAX_EVENT = 16384


def is_partial(head: ResponseHead, data: bytes, start: int) -> bool:
    """Whether the first event of a stream, from `start` on, is not all there; bodies of known length are not held."""
    if head.content_length is not None or len(data) - start > MAX_EVENT:
        return False
    return data.find(b"\n\n", start) < 0 and data.find(b"\r\n\r\n", start) < 0


def first_event_error(data: bytes, start: int) -> Outcome | None:
    """`data` from `start` on: what came first of the body, in chunks or not. None: nothing is wrong with it."""
    is_named = data.find(b"event: error", start, start + 64) >= 0
    if not is_named and data.find(b'"error"', start, start + MAX_EVENT) < 0:
        return None
    begin = data.find(b"data:", start)
    end = data.find(b"\n", begin)
    if begin < 0 or end < 0:
        return None
    try:
        told = orjson.loads(data[begin + 5 : end])
    except orjson.JSONDecodeError:
        return None
    return error_told(told, is_named=is_named)


def error_told(told: object, *, is_named: bool = False) -> Outcome | None:
    """What an event's JSON says; `is_named`: the event's name says that it is an error."""
    if not isinstance(told, dict) or "choices" in told or not (is_named or told.get("error")):
        return None
    return Outcome(OutcomeKind.ERROR_EVENT, _status_of(told))


def _status_of(told: dict[str, object]) -> int:
    """0 = it tells none."""
    error = told.get("error")
    inner = error if isinstance(error, dict) else {}
    for value in (inner.get("code"), inner.get("status"), told.get("code"), told.get("status_code")):
        number = int(value) if isinstance(value, str) and value.isdigit() and len(value) == 3 else value
        if isinstance(number, int) and 400 <= number <= 599:
            return number
    return 0
