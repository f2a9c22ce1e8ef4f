"""The listening socket of one engine, which a fault may close and open again on the same port."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler


class _CountingServer(web.Server):
    def __init__(
        self,
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        count_connection: Callable[[], None],
    ) -> None:
        super().__init__(
            handle,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=65_536,
            max_field_size=65_536,
        )
        self._count_connection = count_connection

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        self._count_connection()
        super().connection_made(handler, transport)


class Listener:
    def __init__(self, host: str, port: int, backlog: int = 1024) -> None:
        self._host = host
        self._backlog = backlog
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Bound but never listening: it keeps the port ours, and refused, while the other one is closed.
        self._placeholder = self._bind(port)
        self.port: int = self._placeholder.getsockname()[1]
        self._server: web.Server | None = None
        self._accepting: asyncio.AbstractServer | None = None
        self._reopening: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if self._family == socket.AF_INET6 else self._host
        return f"http://{host}:{self.port}"

    @property
    def connections_open(self) -> int:
        return 0 if self._server is None else len(self._server.connections)

    async def start(
        self,
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        count_connection: Callable[[], None],
    ) -> None:
        self._server = _CountingServer(handle, count_connection)
        await self.accept_again()

    async def accept_again(self) -> None:
        self._cancel_reopening()
        if self._accepting is None and self._server is not None:
            loop = asyncio.get_running_loop()
            self._accepting = await loop.create_server(self._server, sock=self._bind(self.port), backlog=self._backlog)

    async def refuse(self, seconds: float | None) -> None:
        """Closes the listening socket only; open connections stay. None: until `accept_again`."""
        self._cancel_reopening()
        self._stop_accepting()
        if seconds is not None:
            self._reopening = asyncio.create_task(self._reopen_after(seconds))

    async def close(self) -> None:
        self._cancel_reopening()
        self._stop_accepting()
        if self._server is not None:
            # Connections are aborted, not drained: the engine is to end at once.
            for connection in self._server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await self._server.shutdown(timeout=0.01)
        self._placeholder.close()

    def _bind(self, port: int) -> socket.socket:
        sock = socket.socket(self._family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self._host, port))
        except OSError:
            sock.close()
            raise
        return sock

    def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None

    def _cancel_reopening(self) -> None:
        task, self._reopening = self._reopening, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _reopen_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.accept_again()
