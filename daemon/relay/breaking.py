"""How an answer is broken off whose head is out, so that nobody takes it for complete.

An event stream between two chunks gets its open line closed and an error event, then the connection ends without the
final chunk. Inside a chunk, or where no event can be told, it ends at once; where the end of the connection *is* the
end of the body, only a reset can tell.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from pointsman.daemon.errors import RequestError
from pointsman.daemon.relay.answers import chunk, error_event

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def break_off(exchange: Exchange, error: RequestError) -> None:
    """The connection is closed by whoever ends the exchange; `error` is told where it can be."""
    head, framing, transport = exchange.head, exchange.framing, exchange.client.transport
    assert head is not None and framing is not None
    is_framed = not (framing.ends_with_connection or exchange.is_unchunked)
    if head.is_event_stream and (framing.is_between_chunks or not is_framed):
        event = _closing(framing.tail) + error_event(error)
        transport.write(chunk(event) if is_framed else event)
    elif not is_framed:
        peer: socket.socket | None = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        transport.abort()


def _closing(tail: bytes) -> bytes:
    """What ends an open line and an open event, given the last bytes of an event stream."""
    text = tail.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not text or text.endswith(b"\n\n"):
        return b""
    return b"\n" if text.endswith(b"\n") else b"\n\n"
