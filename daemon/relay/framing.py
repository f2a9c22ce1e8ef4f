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
_LENGTH, _CLOSE, _CHUNK_SIZE, _CHUNK_DATA, _CHUNK_END, _TRAILER, DONE = State
MAX_KNOWN_SIZES = 4096
_known_sizes: dict[bytes, int] = {}
"""Size lines that were read before, with their CRLF; never those of pieces too short to stand for the tail."""
_HEX = frozenset(b"0123456789abcdefABCDEF")


class BodyFraming:
    """Feed it what follows the head; `is_done` says that the message is complete.

    `tail` holds the last payload bytes (up to 4): enough to know whether an SSE line or event is open.
    """

    __slots__ = ("_last", "_line", "_tail", "_trailer_bytes", "left", "state")

    def __init__(self, state: State, length: int = 0) -> None:
        self.state = DONE if state == _LENGTH and length == 0 else state
        self.left = length
        self._tail = b""
        self._last: tuple[bytes, int, int] = (b"", 0, 0)
        """the last payload read: where it lies, so that `tail` costs nothing until somebody asks"""
        self._line = b""
        self._trailer_bytes = 0

    @property
    def is_done(self) -> bool:
        return self.state is DONE

    @property
    def is_between_chunks(self) -> bool:
        return self.state is _CHUNK_SIZE and not self._line

    @property
    def ends_with_connection(self) -> bool:
        return self.state is _CLOSE

    @property
    def tail(self) -> bytes:
        """The last payload bytes (up to 4): enough to know whether an SSE line or event is open."""
        data, start, end = self._last
        return (self._tail + data[max(start, end - 4) : end])[-4:]

    def _take(self, data: bytes, start: int, end: int, pieces: list[bytes] | None) -> None:
        """`data[start:end]` is payload."""
        if end - start < 4:  # too short to stand for the tail alone
            self._tail = self.tail
        self._last = (data, start, end)
        if pieces is not None:
            pieces.append(data[start:end])

    def spoil(self) -> None:
        """After a FramingError nobody knows which of the bytes the client has: it counts as inside a chunk."""
        self.state, self.left = _LENGTH, 1

    def take_one_chunk(self, data: bytes) -> bool:
        """Whether `data` is exactly one chunk of a size seen before: then it is taken, at the least cost.

        That is what a streaming engine writes for an event, thousands of times a second. False: call `feed`.
        """
        if self.state is not _CHUNK_SIZE or self._line:
            return False
        start = data.find(b"\r\n", 0, 10) + 2
        length = _known_sizes.get(data[:start])
        if length is None or len(data) != start + length + 2 or data[-2:] != b"\r\n":
            return False
        self._last = (data, start, start + length)
        return True

    def feed(self, data: bytes, position: int = 0, pieces: list[bytes] | None = None) -> int:
        """Consume from `position`; returns the position after the last byte that belongs to this message.

        Payload is appended to `pieces` where given. Raises FramingError.
        """
        size = len(data)
        while position < size:
            state = self.state
            if state is _CHUNK_SIZE:
                # a whole chunk in one read, which is what a streaming engine writes, without further calls
                start = data.find(b"\r\n", position, position + 10) + 2
                line = data[position : start - 2] if start > 2 and not self._line else b""
                if line and _HEX.issuperset(line) and (length := int(line, 16)):
                    end = start + length
                    if data[end : end + 2] == b"\r\n":
                        self._take(data, start, end, pieces)
                        position = end + 2
                        if length > 3 and len(_known_sizes) < MAX_KNOWN_SIZES:
                            _known_sizes[line + b"\r\n"] = length
                        continue
                position = self._read_size(data, position)
            elif state is _CHUNK_DATA or state is _LENGTH:
                end = min(position + self.left, size)
                self._take(data, position, end, pieces)
                self.left -= end - position
                position = end
                if self.left == 0:
                    self.state = _CHUNK_END if state is _CHUNK_DATA else DONE
            elif state is _CHUNK_END:
                position = self._read_chunk_end(data, position)
            elif state is _TRAILER:
                position = self._read_trailer(data, position)
            elif state is _CLOSE:
                self._take(data, position, size, pieces)
                position = size
            else:
                break
        return position

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
            self.state = DONE
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILERS:
            raise FramingError("the trailers are too long")
        return position
