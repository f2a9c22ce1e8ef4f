"""What a client got, to the last byte: one answer, whole or broken, and nothing behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.fakes.traffic import Client, read_fields

DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    """Without chunk framing; of a broken answer, what came of it."""
    is_whole: bool
    """It ended where its framing says; otherwise the connection ended before."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[bytes]:
        """Of an event stream; what follows the last blank line is one too."""
        return [event for event in self.body.split(b"\n\n") if event]

    @property
    def data(self) -> list[Any]:
        """The JSON of its events, `[DONE]` apart."""
        return [json.loads(event.removeprefix(b"data: ")) for event in self.events if event != DONE]

    @property
    def error_code(self) -> Any:
        return self.json["error"]["code"]

    @property
    def text(self) -> str:
        """Of a completion."""
        if self.headers["content-type"].startswith("text/event-stream"):
            return "".join(event["choices"][0]["text"] for event in self.data if "choices" in event)
        return str(self.json["choices"][0]["text"])


def read_answer(client: Client) -> Answer:
    """The next answer on the connection."""
    headers = client.read_head()
    body = _Body(client.rest, client.sock.recv)
    answer = body.answer(headers)
    client.rest = body.rest
    return answer


def parse_answer(raw: bytes) -> Answer:
    """All that came on a connection; what follows the answer is an error."""
    head, blank, rest = raw.partition(b"\r\n\r\n")
    assert blank, f"no head of an answer: {raw!r}"
    body = _Body(rest, lambda _size: b"")
    answer = body.answer(read_fields(head))
    assert body.rest == b"", f"behind the answer: {body.rest!r}"
    return answer


class _Body:
    """The body that begins with `raw` and goes on with what `receive` returns, nothing at the end."""

    def __init__(self, raw: bytes, receive: Callable[[int], bytes]) -> None:
        self._raw = bytearray(raw)
        self._receive_some = receive
        self._at = 0
        self._pieces: list[bytes] = []

    @property
    def rest(self) -> bytes:
        return bytes(self._raw[self._at :])

    def answer(self, headers: dict[str, str]) -> Answer:
        if "content-length" in headers:
            is_whole = self._take(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            is_whole = self._take_chunks()
        else:
            is_whole = self._take_rest()
        return Answer(int(headers[":status"]), headers, b"".join(self._pieces), is_whole)

    def _take(self, size: int) -> bool:
        """That many bytes of the body; False: fewer came."""
        while len(self._raw) < self._at + size and self._receive():
            pass
        taken = bytes(self._raw[self._at : self._at + size])
        self._at += len(taken)
        self._pieces.append(taken)
        return len(taken) == size

    def _take_rest(self) -> bool:
        while self._receive():
            pass
        return self._take(len(self._raw) - self._at)

    def _take_chunks(self) -> bool:
        while (line := self._line()) is not None:
            size = int(line, 16)
            if not self._take(size):
                return False
            line = self._line()
            if line is None:
                return False
            assert line == b"", f"no end of a chunk: {line!r}"
            if size == 0:
                return True
        return False

    def _line(self) -> bytes | None:
        while (end := self._raw.find(b"\r\n", self._at)) < 0:
            if not self._receive():
                return None
        line = bytes(self._raw[self._at : end])
        self._at = end + 2
        return line

    def _receive(self) -> bool:
        try:
            more = self._receive_some(65536)
        except ConnectionResetError:
            return False
        self._raw += more
        return bool(more)
