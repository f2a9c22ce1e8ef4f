"""Where a response body ends, without touching its bytes.

The relay forwards what it reads; this tells how much of it belongs to the message. It never copies payload, except
for a client that cannot read chunks (HTTP/1.0), for which it collects the pieces.

Strict where laxness would let two readers disagree: chunk sizes are plain hex digits, lines end in CRLF.
"""

from __future__ import annotations

from enum import IntEnum


class FramingError(Exception):
    """The bytes cannot be the framing that the head announced."""


class State(IntEnum):
    LENGTH = 0
    CLOSE = 1
    CHUNK_SIZE = 2
    CHUNK_DATA = 3
    CHUNK_END = 4
    TRAILER = 5
    DONE = 6


MAX_LINE = 4096
MAX_TRAILERS = 16384
_LENGTH, _CLOSE, _CHUNK_SIZE, _CHUNK_DATA, _CHUNK_END, _TRAILER, _DONE = State
_HEX = frozenset(b"0123456789abcdefABCDEF")


class BodyFraming:
    """Feed it what follows the head; `is_done` says that the message is complete.

    `tail` holds the last payload bytes (up to 4): enough to know whether an SSE line or event is open.
    """

    __slots__ = ("_line", "_trailer_bytes", "left", "state", "tail")

    def __init__(self, state: State, length: int = 0) -> None:
        self.state = _DONE if state == _LENGTH and length == 0 else state
        self.left = length
        self.tail = b""
        self._line = b""
        self._trailer_bytes = 0

    @property
    def is_done(self) -> bool:
        return self.state is _DONE

    @property
    def is_between_chunks(self) -> bool:
        return self.state is _CHUNK_SIZE and not self._line

    @property
    def ends_with_connection(self) -> bool:
        return self.state is _CLOSE

    def spoil(self) -> None:
        """After a FramingError nobody knows which of the bytes the client has: it counts as inside a chunk."""
        self.state, self.left = _LENGTH, 1

    def feed(self, data: bytes, position: int = 0, pieces: list[bytes] | None = None) -> int:
        """Consume from `position`; returns the position after the last byte that belongs to this message.

        Payload is appended to `pieces` where given. Raises FramingError.
        """
        size = len(data)
        payload_start = payload_end = 0
        while position < size:
            state = self.state
            if state is _CHUNK_SIZE:
                # a whole chunk in one read, which is what a streaming engine writes, without a call
                start = data.find(b"\r\n", position, position + 10) + 2
                if start > 2 and not self._line:
                    line = data[position : start - 2]
                    if line and _HEX.issuperset(line) and (length := int(line, 16)):
                        end = start + length
                        if data[end : end + 2] == b"\r\n":
                            if pieces is not None:
                                pieces.append(data[start:end])
                            if payload_end and length < 4:
                                self._note_tail(data, payload_start, payload_end)
                            payload_start, payload_end = start, end
                            position = end + 2
                            continue
                position = self._read_size(data, position)
            elif state is _CHUNK_DATA or state is _LENGTH:
                end = position + self.left
                if end > size:
                    end = size
                self.left -= end - position
                if pieces is not None:
                    pieces.append(data[position:end])
                if payload_end and end - position < 4:
                    self._note_tail(data, payload_start, payload_end)
                payload_start, payload_end = position, end
                position = end
                if self.left == 0:
                    self.state = _CHUNK_END if state is _CHUNK_DATA else _DONE
            elif state is _CHUNK_END:
                position = self._read_chunk_end(data, position)
            elif state is _TRAILER:
                position = self._read_trailer(data, position)
            elif state is _CLOSE:
                if pieces is not None:
                    pieces.append(data[position:])
                payload_start, payload_end = position, size
                position = size
            else:
                break
        if payload_end:
            self._note_tail(data, payload_start, payload_end)
        return position

    def _note_tail(self, data: bytes, start: int, end: int) -> None:
        piece = data[max(start, end - 4) : end]
        self.tail = piece if len(piece) == 4 else (self.tail + piece)[-4:]

    def _take_line(self, data: bytes, position: int) -> tuple[bytes | None, int]:
        """(the line without CRLF, or None when it is not complete yet; position after what was consumed)."""
        end = data.find(b"\n", position)
        if end < 0:
            self._line += data[position:]
            if len(self._line) > MAX_LINE:
                raise FramingError("a chunk line is too long")
            return None, len(data)
        line = data[position : end + 1]
        if self._line:
            line = self._line + line
            self._line = b""
        if len(line) > MAX_LINE or line[-2:] != b"\r\n":
            raise FramingError("a chunk line does not end in CRLF")
        return line[:-2], end + 1

    def _read_size(self, data: bytes, position: int) -> int:
        line, position = self._take_line(data, position)
        if line is None:
            return position
        if b";" in line:
            line = line.partition(b";")[0].rstrip(b" \t")
        if not 0 < len(line) <= 16 or not _HEX.issuperset(line):
            raise FramingError(f"bad chunk size {line[:32]!r}")
        self.left = int(line, 16)
        self.state = _CHUNK_DATA if self.left else _TRAILER
        return position

    def _read_chunk_end(self, data: bytes, position: int) -> int:
        if self._line:
            rest = self._line + data[position : position + 1]
            self._line = b""
            position += 1
        else:
            rest = data[position : position + 2]
            if len(rest) == 1:
                if rest != b"\r":
                    raise FramingError("a chunk does not end in CRLF")
                self._line = rest
                return position + 1
            position += 2
        if rest != b"\r\n":
            raise FramingError("a chunk does not end in CRLF")
        self.state = _CHUNK_SIZE
        return position

    def _read_trailer(self, data: bytes, position: int) -> int:
        line, position = self._take_line(data, position)
        if line is None:
            return position
        if not line:
            self.state = _DONE
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILERS:
            raise FramingError("the trailers are too long")
        return position
