"""Structured log lines of supervisor and control: one JSON object per line on standard error.

An event name and key/values, never prompts, never keys. Whoever reads standard error may stall; a line that cannot be
written at once is dropped and counted, because a supervisor that waits for its log's reader supervises nothing.
"""

from __future__ import annotations

import os
import select
import time
from typing import Literal

import msgspec

Level = Literal["debug", "info", "warning", "error"]

_RANKS: dict[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
MAX_FIELD_CHARS = 2000
MAX_LINE_BYTES = 4096
"""what a pipe that polls as writable takes without blocking, in one piece"""

_encoder = msgspec.json.Encoder(enc_hook=str)


class _Sink:
    threshold = _RANKS["info"]
    fd = 2
    dropped = 0


def set_level(level: str) -> None:
    """Lines below `level` are not written; an unknown name means "info"."""
    _Sink.threshold = _RANKS.get(level, _RANKS["info"])


def log(event: str, level: Level = "info", **fields: object) -> None:
    if _RANKS[level] < _Sink.threshold:
        return
    if _Sink.dropped:
        fields["dropped_before"] = _Sink.dropped
    if _write(_line(event, level, fields)):
        _Sink.dropped = 0
    else:
        _Sink.dropped += 1


def _line(event: str, level: str, fields: dict[str, object]) -> bytes:
    stamp = {"ts": round(time.time(), 3), "level": level, "event": event}
    line = _encoder.encode(stamp | {name: _plain(value) for name, value in fields.items()})
    if len(line) >= MAX_LINE_BYTES:
        line = _encoder.encode(stamp | {"truncated": line[: MAX_LINE_BYTES // 4].decode("utf-8", "ignore")})
    return line + b"\n"


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = value.encode("utf-8", "replace").decode()  # file names may hold lone surrogates
    return value if len(value) <= MAX_FIELD_CHARS else value[:MAX_FIELD_CHARS] + "…"


def _write(line: bytes) -> bool:
    poll = select.poll()
    poll.register(_Sink.fd, select.POLLOUT)
    try:
        for _, happened in poll.poll(0):
            if happened & select.POLLOUT:
                return os.write(_Sink.fd, line) == len(line)
    except OSError:  # the reader is gone; there is nobody left to tell
        return False
    return False
