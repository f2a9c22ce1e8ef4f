"""A worker that does exactly what a test tells it: a socket server whose every connection runs a script.

A script is a function of a `Session`; it reads requests byte by byte with no HTTP library in between (so what the
gateway sent is seen as it was sent) and writes whatever bytes it likes.
"""

from __future__ import annotations

import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from tests.fakes.leeway import SLOW_MACHINE

TIMEOUT_S = 10.0 * SLOW_MACHINE
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@dataclass(frozen=True)
class Seen:
    """One request as the worker read it."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name.lower()]


class Session:
    """One connection of the gateway."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    def read(self) -> Seen | None:
        """The next request (by Content-Length), or None when the gateway closed the connection."""
        while b"\r\n\r\n" not in self._rest:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._rest += data
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        headers = [(line.partition(b":")[0], line.partition(b":")[2].strip()) for line in lines]
        size = next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)
        while len(self._rest) < size:
            self._rest += self.sock.recv(1 << 20)
        body, self._rest = self._rest[:size], self._rest[size:]
        return Seen(first, headers, body)

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_closed(self) -> None:
        """Until the gateway closes its side."""
        try:
            while self.sock.recv(65536):
                pass
        except OSError:
            return


Script = Callable[[Session], None]


def answer_all(answer: bytes) -> Script:
    """Every request gets `answer`; the connection stays open."""

    def script(session: Session) -> None:
        while session.read() is not None:
            session.write(answer)

    return script


@dataclass
class ScriptedWorker:
    script: Script = field(default_factory=lambda: answer_all(OK))
    requests: queue.Queue[Seen] = field(default_factory=queue.Queue)
    connections: int = 0
    secure: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"https://localhost:{self.port}" if self.secure else f"http://127.0.0.1:{self.port}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            sock.settimeout(TIMEOUT_S)
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        if self.secure is not None:
            try:
                sock = self.secure.wrap_socket(sock, server_side=True)
            except OSError:  # the other side does not like what it sees
                return
        session = Session(sock)
        original = session.read

        def recording() -> Seen | None:
            seen = original()
            if seen is not None:
                self.requests.put(seen)
            return seen

        session.read = recording  # type: ignore[method-assign]
        with suppress(OSError), sock:  # the gateway may go away, which is what some tests are about
            self.script(session)

    def seen(self) -> Seen:
        """The next request that arrived; waits for it."""
        return self.requests.get(timeout=TIMEOUT_S)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
