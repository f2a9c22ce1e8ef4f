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
    return Answer(int(headers[":status"]), headers, body.data, is_whole)


class _Body:
    """Reads from `client.rest`, where whatever follows the answer stays."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.data = b""

    def _receive(self) -> bool:
        try:
            more = self._client.sock.recv(65536)
        except ConnectionResetError:
            return False
        self._client.rest += more
        return bool(more)

    def take(self, size: int) -> bool:
        client = self._client
        while len(client.rest) < size and self._receive():
            pass
        taken, client.rest = client.rest[:size], client.rest[size:]
        self.data += taken
        return len(taken) == size

    def take_rest(self) -> bool:
        while self._receive():
            pass
        self.data, self._client.rest = self._client.rest, b""
        return True

    def take_chunks(self) -> bool:
        while (size := self._chunk_size()) is not None:
            if not self.take(size):
                return False
            line = self._line()
            if line is None:
                return False
            assert line == b"", f"no end of a chunk: {line!r}"
            if size == 0:
                return True
        return False

    def _chunk_size(self) -> int | None:
        line = self._line()
        return None if line is None else int(line, 16)

    def _line(self) -> bytes | None:
        client = self._client
        while b"\r\n" not in client.rest:
            if not self._receive():
                return None
        line, _, client.rest = client.rest.partition(b"\r\n")
        return line
