"""Message heads: what a worker answered, and the heads that we send to workers and clients.

Framing headers are never forwarded: they are rebuilt from what was parsed, so that no two readers on the way can
disagree about where a message ends. Hop-by-hop headers (RFC 9110, 7.6.1) stop here, those that `Connection` names too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
# what response heads are searched for: hop-by-hop, rebuilt framing, what we answer ourselves, and the content type
_SPECIAL = re.compile(
    rb"\r\n("
    + b"|".join(sorted(HOP_BY_HOP | {b"content-length", b"x-request-id", b"content-type"}))
    + rb"):([^\r\n]*)",
    re.IGNORECASE,
)
_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\r\n\0]*)?\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*\r\n)*\r\n"
)


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


def parse_response_head(raw: bytes) -> ResponseHead:
    """`raw` ends with the empty line. Raises HeadError.

    Validated as a whole, then searched for the few headers that mean something here; the rest stays one run of bytes.
    """
    found = _HEAD.fullmatch(raw)
    if found is None:
        raise HeadError("the worker's response head is malformed")
    keeps_alive = found[1] == b"1"
    length: int | None = None
    is_chunked = is_event_stream = False
    named: set[bytes] = set()
    start = raw.index(b"\r\n")
    status_line = raw[:start]
    kept: list[bytes] = []
    for special in _SPECIAL.finditer(raw, start):
        name, value = special.groups()
        name = name.lower()
        if name == b"content-type":
            is_event_stream = value.lstrip()[:17].lower() == b"text/event-stream"
            continue
        kept.append(raw[start : special.start()])
        start = special.end()
        if name == b"content-length":
            length = _length(value, length)
        elif name == b"transfer-encoding":
            if is_chunked or value.strip().lower() != b"chunked":
                raise HeadError(f"unsupported transfer coding {value.strip()[:64]!r}")
            is_chunked = True
        elif name == b"connection":
            tokens = {token.strip().lower() for token in value.split(b",")}
            named |= tokens - {b"close", b"keep-alive"}
            if b"close" in tokens:
                keeps_alive = False
            elif b"keep-alive" in tokens:
                keeps_alive = True
    if is_chunked and length is not None:
        length, keeps_alive = None, False  # RFC 9112, 6.3: chunked wins, and the connection is not to be trusted
    kept.append(raw[start:-4])
    lines = b"".join(kept)
    if named:
        lines = _without(lines, named)
    return ResponseHead(int(found[2]), status_line, lines, length, is_chunked, keeps_alive, is_event_stream)


def _without(lines: bytes, names: set[bytes]) -> bytes:
    kept = (line for line in lines.split(b"\r\n")[1:] if line.partition(b":")[0].lower() not in names)
    return b"".join(b"\r\n" + line for line in kept)


def _length(value: bytes, before: int | None) -> int:
    text = value.strip()
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
