"""The access line: one JSON object per request, field names ours, never a prompt or a key; or that as text."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from pointsman.daemon.relay.ending import Ending, short_termination
from pointsman.daemon.relay.inbound import Inbound

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext

MAX_LOGGED_PATH = 256


def path_json(request: Inbound) -> bytes:
    return orjson.dumps(request.path[:MAX_LOGGED_PATH].decode("latin-1"))


def request_fields(context: ShardContext, peer: str, request: Inbound, status: int) -> bytes:
    """The fields that every line has, as the open start of a JSON object.

    The parser knows every method, the request id was checked or made by us; whatever else a client wrote goes
    through the encoder.
    """
    return b'{"ts":%.3f,"event":"request","id":"%b","shard":%d,"client":"%b","method":"%b","path":%b,"status":%d' % (
        time.time(),
        request.request_id,
        context.shard,
        peer.encode(),
        request.method,
        path_json(request),
        status,
    )


def short_line(
    context: ShardContext, peer: str, request: Inbound, status: int, ending: Ending, total_s: float
) -> bytes:
    """For a request that no worker saw."""
    fields = request_fields(context, peer, request, status)
    key = b"" if request.key is None else b',"key":' + request.key.name_json
    term = short_termination(ending, status).encode()
    return b'%b%b,"total_ms":%.3f,"end":"%b","term":"%b"}\n' % (fields, key, total_s * 1000, ending.encode(), term)


_HEAD = ("ts", "event", "client", "method", "path", "status", "term")


def text_line(line: bytes) -> bytes:
    """The same request for people: moment, client, what was asked, status and who ended it; the rest as name=value."""
    fields = orjson.loads(line)
    moment = datetime.fromtimestamp(fields["ts"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    head = f"{moment} {fields['client']} {fields['method']} {_word(fields['path'])} {fields['status']} {fields['term']}"
    rest = (f"{name}={_word(value)}" for name, value in fields.items() if name not in _HEAD and value not in (None, ""))
    return f"{head} {' '.join(rest)}\n".encode()


def _word(value: object) -> str:
    """One word, quoted where it would not be one."""
    if isinstance(value, bool):
        return "1" if value else "0"
    text = str(value)
    is_plain = text.isascii() and text.isprintable() and not set(text) & set(' "=\\')
    return text if is_plain and text else orjson.dumps(text).decode()
