"""One client request: its parsed head, its body, and what the strict checks say about it.

llhttp (by httptools) finds the framing; the checks here refuse what it tolerates and what two readers could read in
two ways: duplicates of Host, Authorization and Content-Type, control bytes in values, transfer codings other than
`chunked`, chunks from a HTTP/1.0 client.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from urllib.parse import unquote

from httptools import HttpParserInvalidURLError, parse_url

from pointsman.daemon.errors import Fault, RequestError, malformed_http
from pointsman.daemon.relay.request_lines import (
    SPECIAL,
    HeaderKind,
    header_lines,
    holds_control,
    is_bad_target,
    kind_of,
    length_of,
    path_of,
)
from pointsman.daemon.routing.keys import Key

STEERING = frozenset(
    (
        b"config-profile",
        b"external-filter",
        b"routing-strategy",
        b"x-pointsman-explain",
        b"x-smg-routing-key",
        b"x-smg-target-worker",
    )
)
"""By which a client chooses how or where its request runs, or asks why; not everybody may (`relay.guard`)."""
_ORDINARY, _HOST, _ROUTING = HeaderKind.ORDINARY, HeaderKind.HOST, HeaderKind.ROUTING
_CONTENT_LENGTH, _CONTENT_TYPE = HeaderKind.CONTENT_LENGTH, HeaderKind.CONTENT_TYPE
_AUTHORIZATION, _TRANSFER_ENCODING = HeaderKind.AUTHORIZATION, HeaderKind.TRANSFER_ENCODING
_API_KEY = frozenset((b"x-api-key",))
_TO_WORKERS = frozenset(name for name, kind in SPECIAL.items() if kind in (_ROUTING, _CONTENT_TYPE)) | _API_KEY
"""Of the special ones, those that pass all the same."""
_PLAIN_CONNECTION = ((b"keep-alive",), (b"close",))
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Inbound:
    """What is not set in `__init__` begins as None, 0 or False: it is a C struct (inbound.pxd)."""

    method: bytes
    target: bytes
    path: bytes
    connection_names: tuple[bytes, ...]
    authorization: bytes | None
    """for the worker, if it has no key of its own"""
    api_key: bytes | None
    """the `x-api-key` header"""
    key_name: bytes | None
    """as one of ours says; nothing to be believed of others"""
    key: Key | None
    """whose request it is, where keys are asked for"""
    request_id: bytes
    profile: str | None
    """the `config-profile` header"""
    internal_token: bytes | None
    """what a process of this daemon shows"""
    is_internal: bool
    """it did: no key is asked for, and everybody else goes first"""
    is_streamed: bool
    """the body goes to another process of ours as it comes"""
    has_routing_headers: bool
    wants_explanation: bool
    content_length: int | None
    has_body: bool
    expects_continue: bool
    is_http_1_0: bool
    keep_alive: bool
    is_head_complete: bool
    is_complete: bool
    body_size: int
    body_start: int
    """of the body in what `read_with_body` returns"""
    held_bytes: int
    """what counts against the body buffers: the body, and what is held besides"""
    error: RequestError | None
    _fields: list[bytes]
    """names and values of the headers by turns: the parser's objects, and none besides"""
    _passing: bytes
    """complete lines of the headers that go to the worker"""

    def __init__(self, started: float) -> None:
        self.started = started
        self._fields: list[bytes] = []
        self.method = self.target = self.path = self.request_id = b""
        self.connection_names = ()
        self.keep_alive = True
        self._passing = b""
        self._chunks: list[bytes] = []

    # --- the head

    def add_header(self, name: bytes, value: bytes) -> None:
        self._fields.append(name)
        self._fields.append(value)

    def header_count(self) -> int:
        return len(self._fields) // 2

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(zip(self._fields[::2], self._fields[1::2], strict=True))

    def finish_head(self, method: bytes, version: str, keep_alive: bool) -> None:
        """Raises RequestError when the head is not acceptable."""
        self.is_head_complete = True
        self.method = method
        self.keep_alive = keep_alive
        if version != "1.1":
            self.is_http_1_0 = version == "1.0"
            if not self.is_http_1_0:
                raise malformed_http(f"HTTP/{version} is not supported", status=505)
        self._read_headers()
        self._read_target()

    def _read_headers(self) -> None:
        """One pass: what is special is understood, the rest is collected as the lines that go to the worker."""
        host: bytes | None = None
        has_encoding = has_type = False
        fields = self._fields
        passing: list[bytes] = []
        for n in range(0, len(fields), 2):
            name, value = fields[n], fields[n + 1]
            kind = kind_of(name)
            if kind == _ORDINARY:
                passing.append(name)
                passing.append(value)
            elif kind == _HOST:
                if host is not None:
                    raise malformed_http("more than one Host header")
                host = value
            elif kind == _CONTENT_LENGTH:
                length = length_of(value)
                if length < 0 or self.content_length is not None:
                    raise malformed_http("bad or repeated Content-Length")
                self.content_length = length
            elif kind == _CONTENT_TYPE:
                if has_type:
                    raise malformed_http("more than one Content-Type header")
                has_type = True
                passing.append(name)
                passing.append(value)
            elif kind == _AUTHORIZATION:
                if self.authorization is not None:
                    raise malformed_http("more than one Authorization header")
                self.authorization = value
            elif kind == _TRANSFER_ENCODING:
                if has_encoding or value.lower() != b"chunked" or self.is_http_1_0:
                    raise malformed_http("unsupported transfer coding")
                has_encoding = True
            elif kind == _ROUTING:
                self.has_routing_headers = True
                passing.append(name)
                passing.append(value)
            else:
                self._read_rarer(name.lower(), value)
        if has_encoding and self.content_length is not None:
            raise malformed_http("both Content-Length and Transfer-Encoding")
        if host is None and not self.is_http_1_0:
            raise malformed_http("the Host header is missing")
        self.has_body = has_encoding or self.content_length is not None
        lines = header_lines(passing)
        self._passing = self._passing + lines if self._passing else lines
        if holds_control(self._passing) or (host is not None and holds_control(host)):
            raise malformed_http("a header value holds a control character")

    def _read_rarer(self, key: bytes, value: bytes) -> None:
        if key == b"connection":
            self.connection_names += tuple(token.strip().lower() for token in value.split(b","))
        elif key == b"expect":
            if value.lower() != b"100-continue":
                raise RequestError(417, "expectation_failed", "unknown expectation", fault=Fault.CLIENT, close=True)
            self.expects_continue = not self.is_http_1_0
        elif key == b"x-request-id":
            if _SANE_ID.fullmatch(value):
                self.request_id = value
        elif key == b"config-profile":
            self.profile = value.decode("latin-1").strip()
        elif key == b"x-pointsman-explain":
            self.wants_explanation = value not in (b"", b"0", b"false")
        elif key == b"x-pointsman-internal":
            self.internal_token = value
        elif key == b"x-pointsman-key":
            self.key_name = value
        elif key == b"x-api-key":
            if self.api_key is not None:
                raise malformed_http("more than one X-Api-Key header")
            self.api_key = value
            self._passing = b"X-Api-Key: %b\r\n" % value  # the worker's, unless the gateway asks for keys itself

    def _read_target(self) -> None:
        target = self.target
        if not target.startswith(b"/"):
            target = self.target = self._origin_form(target)
        if is_bad_target(target):
            raise malformed_http("bad request target")
        self.path = path_of(target)

    def _origin_form(self, target: bytes) -> bytes:
        """`http://host/path` must be accepted of a server (RFC 9112, 3.2.2); the authority was checked as Host."""
        if not target.lower().startswith((b"http://", b"https://")):
            if target == b"*" and self.method == b"OPTIONS":
                return b"/*"
            raise malformed_http("bad request target")
        try:
            url = parse_url(target)
        except HttpParserInvalidURLError:
            raise malformed_http("bad request target") from None
        query = b"?" + url.query if url.query else b""
        return (url.path or b"/") + query

    def head_size(self) -> int:
        """Bytes of the request line and the headers, about."""
        return len(self.target) + sum(map(len, self._fields)) + 4 * self.header_count()

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return None

    def header_map(self) -> dict[str, str]:
        """Lower-case names, the first value of each."""
        found: dict[str, str] = {}
        for name, value in self.headers:
            found.setdefault(name.lower().decode("latin-1"), value.decode("latin-1"))
        if self.key is not None and self.key.user:
            found["user"] = self.key.user
        return found

    @property
    def user(self) -> bytes | None:
        """Who the request counts for: what its key says goes before what the client says."""
        if self.key is not None and self.key.user:
            return self.key.user.encode()
        return self.header(b"user")

    @property
    def shown_key(self) -> bytes:
        """What tells the key of one client from that of another; "" for those without."""
        return self.authorization or self.api_key or b""

    def passing_lines(self) -> bytes:
        """The headers that go to the worker untouched, as complete lines."""
        named = self.connection_names
        if not named or named in _PLAIN_CONNECTION:
            return self._passing
        return self._lines_without(frozenset(named))

    def _lines_without(self, names: AbstractSet[bytes]) -> bytes:
        parts: list[bytes] = []
        for name, value in self.headers:
            key = name.lower()
            if key not in names and (key not in SPECIAL or key in _TO_WORKERS):
                parts += (name, b": ", value, b"\r\n")
        return b"".join(parts)

    # --- who asks, and what they may

    def identify(self, key: Key) -> None:
        """The client is who it says. What it showed for that is ours, and no worker's."""
        self.key = key
        self.authorization = None
        if self.api_key is not None:
            self.drop_headers(_API_KEY)

    @property
    def steering(self) -> list[bytes]:
        """The names of its headers that are in STEERING."""
        if not (self.has_routing_headers or self.profile is not None or self.wants_explanation):
            return []
        return [key for key in (name.lower() for name, _ in self.headers) if key in STEERING]

    def drop_headers(self, names: AbstractSet[bytes]) -> None:
        """As if the client had not sent them."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in names]
        self._fields = [field for header in kept for field in header]
        self._passing = self._lines_without(frozenset())
        self.has_routing_headers = any(kind_of(name) == _ROUTING for name, _ in kept)
        if b"config-profile" in names:
            self.profile = None
        if b"x-pointsman-explain" in names:
            self.wants_explanation = False

    @property
    def text_path(self) -> str:
        return unquote(self.path.decode("latin-1"), errors="replace")

    # --- the body

    def missing_bytes(self) -> int:
        """What has still to come of a body whose length is known; 0 as well if the head is not complete."""
        return 0 if self.content_length is None else self.content_length - self.body_size

    def add_body(self, read: bytes, start: int = 0) -> None:
        """All of `read` from `start` on; only the first part of a body may begin behind something else."""
        size = len(read) - start
        if start:
            self.body_start = start
        self._chunks.append(read)
        self.body_size += size
        self.held_bytes += size

    def body(self) -> bytes:
        chunks = self._chunks
        if len(chunks) == 1 and not self.body_start:
            return chunks[0]
        joined = b"".join((memoryview(chunks[0])[self.body_start :], *chunks[1:])) if chunks else b""
        self._chunks = [joined]
        self.body_start = 0
        return joined

    def read_with_body(self) -> bytes:
        """What ends with the body, and may have the head before it, up to `body_start`: nothing is copied for it."""
        chunks = self._chunks
        return chunks[0] if len(chunks) == 1 else self.body()

    def body_view(self) -> bytes | memoryview:
        """The body for who writes it."""
        read = self.read_with_body()
        return memoryview(read)[self.body_start :] if self.body_start else read

    def replace(self, target: bytes, body: bytes) -> None:
        """Go to the worker as another request: `body` is JSON. The method is the exchange's."""
        named = frozenset((b"content-type", b"expect", *self.connection_names))
        self._passing = self._lines_without(named) + b"Content-Type: application/json\r\n"
        self.connection_names = ()
        self.target = target
        self.has_body = True
        self._chunks = [body]
        self.body_start = 0
        self.body_size = len(body)

    def hold(self, more_bytes: int) -> int:
        """So much is kept besides the body; returns by how much that is more than before."""
        before, self.held_bytes = self.held_bytes, self.body_size + more_bytes
        return self.held_bytes - before

    def drop_body(self) -> int:
        """Forget the body (once a worker answers, nobody needs it again); returns the bytes that this sets free."""
        if self._chunks:
            self._chunks = []
        self.body_start = 0
        freed, self.held_bytes = self.held_bytes, 0
        return freed
