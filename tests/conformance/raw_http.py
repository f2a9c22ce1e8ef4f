"""A HTTP client that hides nothing: bytes out, bytes in, and how the connection ended."""

from __future__ import annotations

import socket
from dataclasses import dataclass

BODY = b'{"model": "m", "prompt": "hello"}'


def post(
    path: bytes = b"/v1/completions",
    body: bytes = BODY,
    *headers: bytes,
    version: bytes = b"1.1",
    length: bool = True,
    host: bool = True,
) -> bytes:
    lines = [b"POST " + path + b" HTTP/" + version]
    if host:
        lines.append(b"Host: gateway")
    lines += headers
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(path: bytes, *headers: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join((method + b" " + path + b" HTTP/" + version, b"Host: gateway", *headers)) + b"\r\n\r\n"


@dataclass
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    raw_body: bytes
    """as it came: with its chunk framing"""
    is_complete: bool = True

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class Reader:
    """Reads answers one by one from a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""

    def _more(self) -> bool:
        data = self.sock.recv(65536)
        self.rest += data
        return bool(data)

    def answer(self, method: bytes = b"POST") -> Answer:
        """The next answer that is not 1xx. Raises EOFError when the connection ends before its head."""
        status, headers = self.head()
        while status < 200:
            status, headers = self.head()
        answer = Answer(status, headers, b"", b"")
        if method == b"HEAD" or status in (204, 304):
            return answer
        if answer.header(b"transfer-encoding") == b"chunked":
            self._chunked(answer)
        elif (length := answer.header(b"content-length")) is not None:
            while len(self.rest) < int(length) and self._more():
                pass
            answer.body = answer.raw_body = self.rest[: int(length)]
            self.rest = self.rest[int(length) :]
            answer.is_complete = len(answer.body) == int(length)
        else:
            answer.body = answer.raw_body = self.until_closed()
        return answer

    def head(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        while b"\r\n\r\n" not in self.rest:
            if not self._more():
                raise EOFError(self.rest)
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        pairs = [(line.partition(b":")[0], line.partition(b":")[2].strip()) for line in lines]
        return int(first.split()[1]), pairs

    def _chunked(self, answer: Answer) -> None:
        while True:
            while b"\r\n" not in self.rest:
                if not self._more():
                    answer.is_complete = False
                    return
            line, _, _ = self.rest.partition(b"\r\n")
            size = int(line, 16)
            end = len(line) + 2 + size + 2
            while len(self.rest) < end:
                if not self._more():
                    answer.is_complete = False
                    answer.raw_body += self.rest
                    return
            answer.body += self.rest[len(line) + 2 : end - 2]
            answer.raw_body += self.rest[:end]
            self.rest = self.rest[end:]
            if size == 0:
                return

    def until_closed(self) -> bytes:
        while self._more():
            pass
        data, self.rest = self.rest, b""
        return data

    def is_closed(self) -> bool:
        """Whether the peer closes now, with nothing left to read."""
        try:
            return not self.rest and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True
