"""What a client got, to the last byte: one answer, whole or broken, and nothing behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.fakes.traffic import Client

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
    body = _Body(client)
    if "content-length" in headers:
        is_whole = body.take(int(headers["content-length"]))
    elif headers.get("transfer-encoding") == "chunked":
        is_whole = body.take_chunks()
    else:
        is_whole = body.take_rest()
    return Answer(int(headers[":status"]), headers, body.end(), is_whole)


class _Body:
    """Reads on from `client.rest`, where whatever follows the answer stays."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._raw = bytearray(client.rest)
        self._at = 0
        self._pieces: list[bytes] = []

    def end(self) -> bytes:
        self._client.rest = bytes(self._raw[self._at :])
        return b"".join(self._pieces)

    def take(self, size: int) -> bool:
        """That many bytes of the body; False: fewer came."""
        while len(self._raw) < self._at + size and self._receive():
            pass
        taken = bytes(self._raw[self._at : self._at + size])
        self._at += len(taken)
        self._pieces.append(taken)
        return len(taken) == size

    def take_rest(self) -> bool:
        while self._receive():
            pass
        return self.take(len(self._raw) - self._at)

    def take_chunks(self) -> bool:
        while (line := self._line()) is not None:
            size = int(line, 16)
            if not self.take(size):
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
            more = self._client.sock.recv(65536)
        except ConnectionResetError:
            return False
        self._raw += more
        return bool(more)
