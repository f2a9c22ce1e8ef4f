"""The access line: one JSON object per request, field names ours, never a prompt or a key."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import orjson

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


def short_line(context: ShardContext, peer: str, request: Inbound, status: int, ending: str, total_s: float) -> bytes:
    """For a request that no worker saw."""
    fields = request_fields(context, peer, request, status)
    key = b"" if request.key is None else b',"key":' + request.key.name_json
    return b'%b%b,"total_ms":%.3f,"end":"%b"}\n' % (fields, key, total_s * 1000, ending.encode())
