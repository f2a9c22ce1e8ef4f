"""Structured log lines of all processes but for requests: one JSON object per line on standard error.

An event name and key/values, never prompts, never keys. Under systemd, where standard error is the journal, every line
begins with its priority (`<6>`), which the journal takes off again.

Whoever reads standard error may stall; a line that cannot be written at once is dropped and counted, because a
supervisor that waits for its log's reader supervises nothing.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

Level = Literal["debug", "info", "warning", "error"]

_RANKS: dict[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
PRIORITIES: dict[str, bytes] = {"debug": b"<7>", "info": b"<6>", "warning": b"<4>", "error": b"<3>"}
"""syslog's, as sd-daemon(3) wants them"""
MAX_FIELD_CHARS = 2000
MAX_LINE_BYTES = 4096
"""what a pipe that polls as writable takes without blocking, in one piece"""

_encoder = msgspec.json.Encoder(enc_hook=str)


def is_journal(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd has connected `fd` to its journal: $JOURNAL_STREAM is the device and inode of that stream."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LevelSource(Protocol):
    def current_level(self) -> str: ...


class FixedLevel:
    def __init__(self, level: str) -> None:
        self._level = level

    def current_level(self) -> str:
        return self._level


class _Sink:
    level: LevelSource = FixedLevel("info")
    fd = 2
    is_journal = is_journal(2)
    dropped = 0


def set_level(level: str) -> None:
    """Lines below `level` are not written; an unknown name means "info"."""
    follow_level(FixedLevel(level))


def follow_level(level: LevelSource) -> None:
    """As `set_level`, asked anew for every line."""
    _Sink.level = level


def log(event: str, level: Level = "info", **fields: object) -> None:
    if _RANKS[level] >= _RANKS.get(_Sink.level.current_level(), _RANKS["info"]):
        _log(event, level, fields)


def audit(**fields: object) -> None:
    """Who changed what: a line that no level hides."""
    _log("audit", "info", fields)


def _log(event: str, level: Level, fields: dict[str, object]) -> None:
    if _Sink.dropped:
        fields["dropped_before"] = _Sink.dropped
    priority = PRIORITIES[level] if _Sink.is_journal else b""
    if _write(priority + _line(event, level, fields)):
        _Sink.dropped = 0
    else:
        _Sink.dropped += 1


def _line(event: str, level: str, fields: dict[str, object]) -> bytes:
    stamp = {"ts": round(time.time(), 3), "level": level, "event": event}
    line = _encoder.encode(stamp | {name: _plain(value) for name, value in fields.items()})
    if len(line) + len(b"<6>\n") > MAX_LINE_BYTES:
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
