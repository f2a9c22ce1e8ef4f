"""Control's end of the leash: messages to the supervisor, and what it says. Its end of file is our end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from pointsman.daemon import leash
from pointsman.daemon.errors import EXIT_OK
from pointsman.daemon.leash import Message

Handler = Callable[[Message, int | None], None]
"""Takes over the descriptor, if there is one."""


class Channel:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._handlers: dict[str, Handler] = {}

    def open(self) -> None:
        """Inside a running loop."""
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._read)

    def on(self, kind: str, handler: Handler) -> None:
        self._handlers[kind] = handler

    def send(self, message: Message, fd: int | None = None) -> None:
        """Raises BlockingIOError when the supervisor is far behind."""
        try:
            leash.send(self._sock, message, fd)
        except BlockingIOError:
            raise
        except OSError:
            _end()

    def _read(self) -> None:
        while True:
            try:
                message, fd = leash.receive(self._sock)
            except BlockingIOError:
                return
            except OSError:
                message, fd = None, None
            if message is None:
                _end()
                return
            handler = self._handlers.get(message.kind)
            if handler is not None:
                handler(message, fd)
            elif fd is not None:
                os.close(fd)


def _end() -> None:
    """The supervisor is gone, and with it sockets and shards: nothing is left to control, nothing to clean up."""
    os._exit(EXIT_OK)
