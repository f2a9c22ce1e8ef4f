"""SGLang's way to end a request that nobody waits for any more.

Closing the connection is enough for an engine that looks at its connections. SGLang does so late where the answer is
no stream; `POST /abort_request` with the request's own id frees its batch slot and cache at once. Best effort: an
engine that does not know the path, or the id, has lost nothing.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pointsman.daemon.relay.heads import request_head

if TYPE_CHECKING:
    from pointsman.daemon.relay.upstream import UpstreamPool

TIMEOUT_S = 2.0


async def abort_request(pool: UpstreamPool, rid: bytes, request_id: bytes) -> None:
    """`rid`: a JSON string, as it stood in the request."""
    worker, body = pool.worker, b'{"rid":%b}' % rid
    head = request_head(
        b"POST",
        pool.base_path + b"/abort_request",
        pool.authority,
        b"Content-Type: application/json\r\nConnection: close\r\n",
        pool.authorization,
        len(body),
        request_id,
    )
    secure: dict[str, Any] = pool.secure()
    with suppress(OSError):
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(worker.address, worker.port, **secure)
            try:
                writer.write(head + body)
                await reader.read(1)  # it was read, if there is an answer
            finally:
                writer.transport.abort()
