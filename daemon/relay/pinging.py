"""What tells the client of a stream that it still waits: comments, before the worker has said anything.

The first ping goes out with a head of our own, of a stream in chunks: only an answer of that form can go on with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointsman.daemon.errors import bad_answer
from pointsman.daemon.relay.answers import chunk
from pointsman.daemon.relay.ending import Ending
from pointsman.daemon.relay.framing import BodyFraming, State
from pointsman.daemon.relay.heads import ResponseHead, client_head
from pointsman.daemon.relay.receiver import NOT_TAKEN
from pointsman.daemon.relay.telling import own_headers

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange

_PING = chunk(b": ping\n\n")
_HEAD = ResponseHead(
    200, b"HTTP/1.1 200 OK", b"\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache", None, True, True, True
)


def ping(exchange: Exchange) -> None:
    """Nothing happens if no worker is asked at the moment, or the client knows no chunks."""
    if exchange.request.is_http_1_0 or exchange.upstream is None:
        return
    out = _PING
    if exchange.head is None:
        exchange.is_pinged = True
        exchange.is_keep_alive = exchange.request.keep_alive and not exchange.context.closes_connections()
        exchange.head, exchange.status, exchange.framing = _HEAD, 200, BodyFraming(State.CHUNK_SIZE)
        own = own_headers(exchange)
        out = client_head(_HEAD, is_http_1_0=False, keep_alive=exchange.is_keep_alive, own_headers=own) + out
    exchange.client.transport.write(out)


def open_after_ping(exchange: Exchange, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
    """The worker's answer goes on with what the client has; or it cannot. Returns what `head_received` does."""
    if head.status != 200 or not (head.is_event_stream and head.is_chunked):
        upstream, exchange.upstream = exchange.upstream, None
        if upstream is not None:
            upstream.set_aside(head, framing, data, position)
        found = f"the worker answered {head.status} after the stream had begun"
        exchange.cut(bad_answer(found), Ending.WORKER_BROKE)
        return NOT_TAKEN
    exchange.head, exchange.framing = head, framing
    exchange.watch.has_answer = True
    return position if position == len(data) else exchange.body_received(framing, data, position)
