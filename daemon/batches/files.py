"""Files as chunks in the payload store: written and read as streams, never whole in memory.

A chunk's key is counted in the ledger before it is written, so whatever ends this process, every chunk that may exist
is known and can be deleted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from secrets import token_hex

from pointsman.daemon.batches.payloads import PayloadLost, Payloads
from pointsman.daemon.batches.rows import FileRow
from pointsman.daemon.batches.shelf import Shelf

CHUNK_BYTES = 256 * 1024
"""small enough to read one for a single line, large enough for 200 MB to be 800 keys"""
WRITE_CHUNKS = 8
"""sent to the store together"""
CACHED_CHUNKS = 64
"""of input files: lines of one group lie anywhere in them"""


def wall_s() -> int:
    """Whole seconds since 1970."""
    return int(time.time())


def chunk_keys(file: FileRow) -> list[str]:
    return [_key(file.id, number) for number in range(file.chunks)]


def _key(id: str, number: int) -> str:
    return f"pointsman/{id}/{number:06d}"


class FileWriter:
    """Begin, write, and in the end either `finish` (or let the ledger do it) or `drop`."""

    def __init__(self, shelf: Shelf, payloads: Payloads, timeout_s: float | None = None) -> None:
        """`timeout_s`: how long a write may try; default: the store's own patience."""
        self.id = f"file-{token_hex(12)}"
        self.size_bytes = 0
        self._shelf = shelf
        self._payloads = payloads
        self._timeout_s = timeout_s
        self._chunks = 0
        self._buffer = bytearray()

    async def begin(self, owner: str, filename: str, purpose: str) -> None:
        await self._shelf.do(self._shelf.ledger.begin_file, self.id, owner, filename, purpose, wall_s())

    async def write(self, data: bytes) -> None:
        """Raises StoreTrouble."""
        self._buffer += data
        self.size_bytes += len(data)
        if len(self._buffer) >= WRITE_CHUNKS * CHUNK_BYTES:
            await self._send(len(self._buffer) // CHUNK_BYTES * CHUNK_BYTES)

    async def flush(self) -> None:
        """Everything that was written is in the store afterwards. Raises StoreTrouble."""
        while self._buffer:
            await self._send(min(len(self._buffer), WRITE_CHUNKS * CHUNK_BYTES))

    async def finish(self, purpose: str, filename: str, expires_at: int | None, most_bytes: int = 0) -> FileRow:
        """Visible from now on. `most_bytes`: of all files of its owner. Raises StoreTrouble, QuotaError."""
        await self.flush()
        ledger = self._shelf.ledger
        return await self._shelf.do(ledger.finish_file, self.id, purpose, filename, expires_at, most_bytes)

    async def drop(self) -> None:
        await self._shelf.do(self._shelf.ledger.drop_file, self.id)

    async def _send(self, size: int) -> None:
        """The buffer keeps what was not sent: after a failure the same may be tried again."""
        starts = range(0, size, CHUNK_BYTES)
        values = {
            _key(self.id, self._chunks + n): bytes(self._buffer[start : min(start + CHUNK_BYTES, size)])
            for n, start in enumerate(starts)
        }
        await self._shelf.do(self._shelf.ledger.extend_file, self.id, self._chunks + len(values), self.size_bytes)
        await self._payloads.put(values, self._timeout_s)
        self._chunks += len(values)
        del self._buffer[:size]


class FileReader:
    """Reads files that are ready; keeps the last chunks."""

    def __init__(self, payloads: Payloads) -> None:
        self._payloads = payloads
        self._cache: OrderedDict[str, bytes] = OrderedDict()

    async def stream(self, file: FileRow) -> AsyncIterator[bytes]:
        """From the first byte to the last, past the cache. Raises StoreTrouble, PayloadLost."""
        keys = chunk_keys(file)
        for start in range(0, len(keys), WRITE_CHUNKS):
            for chunk in await self._payloads.get(keys[start : start + WRITE_CHUNKS]):
                yield chunk

    async def read(self, file: FileRow, place: int, size: int) -> bytes:
        """Raises StoreTrouble, PayloadLost."""
        parts: list[bytes] = []
        while size > 0:
            number, offset = divmod(place, CHUNK_BYTES)
            chunk = await self._chunk(_key(file.id, number))
            part = chunk[offset : offset + size]
            if not part:
                raise PayloadLost([_key(file.id, number)], "a chunk is shorter than it was")
            parts.append(part)
            place += len(part)
            size -= len(part)
        return b"".join(parts)

    async def _chunk(self, key: str) -> bytes:
        chunk = self._cache.get(key)
        if chunk is None:
            (chunk,) = await self._payloads.get([key])
            self._cache[key] = chunk
            if len(self._cache) > CACHED_CHUNKS:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
        return chunk


async def lines_of(stream: AsyncIterator[bytes], most_bytes: int) -> AsyncIterator[tuple[int, int, bytes | None]]:
    """(number from 1, place of the first byte, the line without its end) of a stream of pieces.

    A line longer than `most_bytes` is None; of it no more than that is held.
    """
    number, place, held, is_long = 1, 0, bytearray(), False
    skipped = 0
    async for piece in stream:
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            held += piece[start:end]
            size = skipped + len(held)
            yield number, place, None if is_long or len(held) > most_bytes else bytes(held.removesuffix(b"\r"))
            number, place, is_long, skipped = number + 1, place + size + 1, False, 0
            held.clear()
            start = end + 1
        held += piece[start:]
        if len(held) > most_bytes:
            is_long = True
            skipped += len(held)
            held.clear()
    if held or is_long:
        yield number, place, None if is_long else bytes(held.removesuffix(b"\r"))
