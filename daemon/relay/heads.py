"""Message heads: what a worker answered, and the heads that we send to workers and clients.

Framing headers are never forwarded: they are rebuilt from what was parsed, so that no two readers on the way can
disagree about where a message ends. Hop-by-hop headers (RFC 9110, 7.6.1) stop here, those that `Connection` names too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from pointsman.daemon.relay.framing import BodyFraming, State


class HeadError(Exception):
    """A worker's response head that no strict parser would accept."""


HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\r\n\0]*)?")
_HEADER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\r\n\0]*)")


class _Kind(IntEnum):
    """What a response header line means to the relay."""

    KEEP = 0
    DROP = 1
    EVENT_STREAM = 2
    LENGTH = 3
    ENCODING = 4
    CONNECTION = 5


_KEEP, _DROP, _EVENT_STREAM, _LENGTH, _ENCODING, _CONNECTION = _Kind
_KINDS = dict.fromkeys(HOP_BY_HOP | {b"x-request-id"}, _DROP) | {
    b"content-length": _LENGTH,
    b"transfer-encoding": _ENCODING,
    b"connection": _CONNECTION,
}
MAX_KNOWN_LINES = 1024
_known_lines: dict[bytes, tuple[_Kind, bytes]] = {}
"""Lines that were understood before: an engine sends the same few with every answer. Stops growing when full."""
_known_statuses: dict[bytes, tuple[int, bool]] = {}


@dataclass(slots=True)
class ResponseHead:
    status: int
    status_line: bytes
    lines: bytes
    """header lines to pass on, each with a CRLF before it"""
    content_length: int | None
    is_chunked: bool
    keeps_alive: bool
    is_event_stream: bool

    def header(self, name: bytes) -> bytes | None:
        """The first value of one of the lines that pass on; `name` in lower case."""
        for line in self.lines.split(b"\r\n"):
            key, _, value = line.partition(b":")
            if key.lower() == name:
                return value.strip()
        return None


def parse_response_head(raw: bytes) -> ResponseHead:
    """`raw` ends with the empty line. Raises HeadError."""
    status_line, *lines = raw[:-4].split(b"\r\n")
    status, keeps_alive = _known_statuses.get(status_line) or _read_status(status_line)
    length: int | None = None
    is_chunked = is_event_stream = False
    named: set[bytes] = set()
    kept: list[bytes] = []
    for line in lines:
        kind, value = _known_lines.get(line) or _read_line(line)
        if kind is _KEEP:
            kept.append(line)
        elif kind is _EVENT_STREAM:
            is_event_stream = True
            kept.append(line)
        elif kind is _LENGTH:
            length = _read_length(value, length)
        elif kind is _ENCODING:
            if is_chunked or value.lower() != b"chunked":
                raise HeadError(f"unsupported transfer coding {value[:64]!r}")
            is_chunked = True
        elif kind is _CONNECTION:
            tokens = {token.strip().lower() for token in value.split(b",")}
            named |= tokens - {b"close", b"keep-alive"}
            keeps_alive = b"close" not in tokens and (keeps_alive or b"keep-alive" in tokens)
    if is_chunked and length is not None:
        length, keeps_alive = None, False  # RFC 9112, 6.3: chunked wins, and the connection is not to be trusted
    if named:
        kept = [line for line in kept if line.partition(b":")[0].lower() not in named]
    passing = b"\r\n" + b"\r\n".join(kept) if kept else b""
    return ResponseHead(status, status_line, passing, length, is_chunked, keeps_alive, is_event_stream)


def _read_status(line: bytes) -> tuple[int, bool]:
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise HeadError("the worker's status line is malformed")
    status = int(found[2]), found[1] == b"1"
    if len(_known_statuses) < MAX_KNOWN_LINES:
        _known_statuses[line] = status
    return status


def _read_line(line: bytes) -> tuple[_Kind, bytes]:
    found = _HEADER_LINE.fullmatch(line)
    if found is None:
        raise HeadError("a header line of the worker is malformed")
    name, value = found[1].lower(), found[2].strip()
    kind = _KINDS.get(name, _KEEP)
    if name == b"content-type" and value[:17].lower() == b"text/event-stream":
        kind = _EVENT_STREAM
    known = kind, b"" if kind is _KEEP else value
    if len(_known_lines) < MAX_KNOWN_LINES and name != b"date":
        _known_lines[line] = known
    return known


def _read_length(text: bytes, before: int | None) -> int:
    if not text.isdigit() or len(text) > 18:
        raise HeadError(f"bad Content-Length {text[:32]!r}")
    length = int(text)
    if before is not None and before != length:
        raise HeadError("two different Content-Length")
    return length


def framing_of(head: ResponseHead, method: bytes) -> BodyFraming:
    """RFC 9112, 6.3."""
    if method == b"HEAD" or head.status in (204, 304) or head.status < 200:
        return BodyFraming(State.LENGTH, 0)
    if head.is_chunked:
        return BodyFraming(State.CHUNK_SIZE)
    if head.content_length is not None:
        return BodyFraming(State.LENGTH, head.content_length)
    return BodyFraming(State.CLOSE)


def client_head(head: ResponseHead, *, is_http_1_0: bool, keep_alive: bool, own_headers: bytes) -> bytes:
    """The head for the client. `own_headers` are complete lines with CRLF.

    A HTTP/1.0 client gets no chunks (the relay takes them apart and closes at the end).
    """
    parts = [b"HTTP/1.1", head.status_line[8:], head.lines]
    has_body = head.status not in (204, 304) and head.status >= 200
    if head.content_length is not None and head.status != 204:
        parts.append(b"\r\nContent-Length: %d" % head.content_length)
    elif head.is_chunked and has_body and not is_http_1_0:
        parts.append(b"\r\nTransfer-Encoding: chunked")
    if not keep_alive:
        parts.append(b"\r\nConnection: close")
    elif is_http_1_0:
        parts.append(b"\r\nConnection: keep-alive")
    parts += (b"\r\n", own_headers, b"\r\n")
    return b"".join(parts)


def request_head(
    method: bytes,
    target: bytes,
    host: bytes,
    lines: bytes,
    authorization: bytes | None,
    body_size: int | None,
    request_id: bytes,
) -> bytes:
    """The head for a worker. `lines`: the client's headers that pass, complete with CRLF; None = no body at all."""
    parts = [method, b" ", target, b" HTTP/1.1\r\nHost: ", host, b"\r\n", lines]
    if authorization is not None:
        parts += (b"Authorization: ", authorization, b"\r\n")
    if body_size is not None:
        parts += (b"Content-Length: %d\r\n" % body_size,)
    parts += (b"X-Request-Id: ", request_id, b"\r\n\r\n")
    return b"".join(parts)
