"""The one way out for responses, so that every body can suffer its faults."""

import asyncio
import socket
import struct
from collections.abc import Mapping, Sequence

from aiohttp import web

from pointsman.scripts.simulated_engine.faults import Fault, FaultPlan

_LINGER_ZERO = struct.pack("ii", 1, 0)
# Bytes written right before a RST may be thrown away with it; give the peer time to take them.
_RESET_DELAY_S = 0.02
_NEVER_S = 1e9


class BodyCutError(Exception):
    """A fault ended the body: nothing more is to be written."""


async def hang(seconds: float | None) -> None:
    await asyncio.sleep(_NEVER_S if seconds is None else seconds)


class Reply:
    """The response of one request."""

    def __init__(self, request: web.BaseRequest, headers: Mapping[str, str], plan: FaultPlan) -> None:
        self.request = request
        self.response: web.StreamResponse | None = None
        self.is_closed_by_fault = False
        self.error_event = plan.error_event
        self._headers = headers
        self._plan = plan
        self._cut = plan.cut
        self._sent_bytes = 0
        self._sent_tokens = 0

    async def send(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> web.StreamResponse:
        all_headers = {**self._headers, **(headers or {}), "Content-Type": content_type}
        if not self._plan.touches_body:
            return web.Response(body=body, status=status, headers=all_headers)
        response = web.StreamResponse(status=status, headers=all_headers)
        response.content_length = len(body)
        self.response = response
        await response.prepare(self.request)
        await self._write_unstreamed(body)
        return response

    async def open_stream(self, content_type: str = "text/event-stream; charset=utf-8") -> None:
        response = web.StreamResponse(headers={**self._headers, "Content-Type": content_type})
        self.response = response
        await response.prepare(self.request)
        await self._strike_if_due()

    async def write(self, data: bytes) -> None:
        """Body bytes that are no token: roles, usage, the end mark."""
        if self._plan.touches_body:
            await self._write_faulty(data)
        else:
            await self.opened.write(data)

    async def write_tokens(self, events: Sequence[bytes]) -> None:
        """One event a token; they leave together unless a fault counts them."""
        if not self._plan.touches_body:
            await self.opened.write(b"".join(events))
            return
        for event in events:
            await self._write_faulty(event)
            self._sent_tokens += 1
            await self._strike_if_due()

    async def reset_connection(self) -> None:
        """Closes with RST. Ends in the cancellation that follows the loss of the connection."""
        self.is_closed_by_fault = True
        transport = self.request.transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            transport.abort()
        await asyncio.sleep(_NEVER_S)

    async def close_connection(self) -> None:
        """Closes with FIN after what has been written. Ends in cancellation."""
        self.is_closed_by_fault = True
        if self.request.transport is not None:
            self.request.transport.close()
        await asyncio.sleep(_NEVER_S)

    @property
    def opened(self) -> web.StreamResponse:
        if self.response is None:
            raise RuntimeError("open_stream() first")
        return self.response

    async def _write_unstreamed(self, body: bytes) -> None:
        if self._cut is None or self._cut.after_bytes is not None:
            await self._strike_if_due()
            await self._write_faulty(body)
            return
        half = len(body) // 2
        await self._write_faulty(body[:half])
        await self._strike(self._cut)
        await self._write_faulty(body[half:])

    async def _write_faulty(self, data: bytes) -> None:
        cut = self._cut
        if cut is not None and cut.after_bytes is not None:
            room = cut.after_bytes - self._sent_bytes
            if room <= len(data):
                await self._emit(data[:room])
                await self._strike(cut)
                data = data[room:]
        await self._emit(data)

    async def _emit(self, data: bytes) -> None:
        self._sent_bytes += len(data)
        drip = self._plan.drip
        if drip is None:
            await self.opened.write(data)
            return
        for i in range(len(data)):
            await self.opened.write(data[i : i + 1])
            await asyncio.sleep(drip.ms / 1000)

    async def _strike_if_due(self) -> None:
        cut = self._cut
        if cut is None:
            return
        if cut.after_bytes is not None:
            is_due = self._sent_bytes >= cut.after_bytes
        else:
            is_due = self._sent_tokens >= (cut.after_tokens or 0)
        if is_due:
            await self._strike(cut)

    async def _strike(self, cut: Fault) -> None:
        """Returns only after a hang that has an end."""
        self._cut = None
        if cut.kind == "hang":
            await hang(cut.seconds)
        elif cut.kind == "reset":
            await asyncio.sleep(_RESET_DELAY_S)
            await self.reset_connection()
        elif cut.kind == "close" or self.opened.content_length is not None:
            # An announced length that is not reached cannot end correctly; only closing tells.
            await self.close_connection()
        else:
            raise BodyCutError
