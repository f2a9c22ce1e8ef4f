"""A client that sends exactly the bytes it is told to."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 40.0


@dataclass(frozen=True)
class RawAnswer:
    status: int
    head: str
    body: bytes

    @property
    def is_closing(self) -> bool:
        return "connection: close" in self.head.lower()


def connect(address: tuple[str, int] | Path) -> socket.socket:
    if isinstance(address, Path):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(address))
        return sock
    return socket.create_connection(address, TIMEOUT_S)


def send(address: tuple[str, int] | Path, request: bytes) -> RawAnswer:
    """One request on a connection of its own, one answer."""
    with connect(address) as sock:
        sock.sendall(request)
        return receive(sock)


def receive(sock: socket.socket) -> RawAnswer:
    with sock.makefile("rb") as stream:
        status_line = stream.readline().decode()
        lines = list(iter(lambda: stream.readline().decode().rstrip("\r\n"), ""))
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = stream.read(int(headers.get("content-length", 0)))
    return RawAnswer(int(status_line.split()[1]), "\n".join(lines), body)


def request(method: str, path: str, *headers: str, host: str = "localhost", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
