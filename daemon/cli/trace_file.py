"""What a recording becomes on disk: lines as they come in a file beside the target, at the end the trace itself.

The daemon tells lengths in estimated tokens (bytes of text / 4), which go with its block size, and beside them what the
engine counted where it told. Only at the end is it known how many tokens a block really has: the median of told over
estimated tokens, over prompts long enough that a chat template does not count. The trace gets that block size, and of
each request the engine's own count as far as its blocks allow: a replay must not find a prompt longer than its blocks,
or its hit rate would be off.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import BinaryIO, Self, cast

import msgspec
import orjson

LEAST_BLOCKS = 4
"""Of a prompt that says how many tokens a block has."""
BYTES_PER_TOKEN = 4


class _Line(msgspec.Struct):
    input_length: int | None = None
    timestamp: float = 0.0
    prompt_tokens: int | None = None
    block_bytes: int | None = None


class Summary(msgspec.Struct, frozen=True):
    """The daemon's last word: requests in the recording, and what is not in it."""

    recorded: int
    failed: int
    lost: int
    unfinished: int


class Request(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    model: str
    stream: bool
    prompt_tokens: int | None = None


class Spool:
    """Lines as they come, in a file that only its owner may read; deleted at the end of the block unless `keep`."""

    def __init__(self, path: Path, *, may_replace: bool) -> None:
        """Raises OSError, FileExistsError when it is there from a recording that was killed."""
        self.path = path
        self.requests = 0
        self.summary: Summary | None = None
        self._file = _create(path, may_replace=may_replace, mode="w+b")
        self._places: list[tuple[float, int]] = []
        """of every request its time and where its line begins"""
        self._ratios: list[float] = []
        self._block_bytes = 512

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None or not self.requests:
            self.path.unlink(missing_ok=True)

    def add(self, line: bytes) -> None:
        """A line of the daemon's, not yet looked at. Raises msgspec.MsgspecError for nonsense."""
        found = msgspec.json.decode(line, type=_Line)
        if found.block_bytes is not None:
            self._block_bytes = found.block_bytes
        elif found.input_length is None:
            self.summary = msgspec.json.decode(line, type=Summary)
            return
        else:
            self._note(found.input_length, found)
        self._file.write(line)
        self._file.flush()  # whoever is killed leaves a trace behind

    def _note(self, estimated: int, line: _Line) -> None:
        self.requests += 1
        self._places.append((line.timestamp, self._file.tell()))
        if line.prompt_tokens and estimated * BYTES_PER_TOKEN >= LEAST_BLOCKS * self._block_bytes:
            self._ratios.append(line.prompt_tokens / estimated)

    @property
    def tokens_per_estimate(self) -> float:
        return median(self._ratios) if self._ratios else 1.0

    @property
    def block_tokens(self) -> int:
        return max(round(self._block_bytes / BYTES_PER_TOKEN * self.tokens_per_estimate), 1)

    def write_trace(self, target: Path, *, may_replace: bool) -> None:
        """In the order of arrival; gzip'd when the name ends with .gz. Raises OSError."""
        with _create(target, may_replace=may_replace, mode="wb") as file, _compressed(target, file) as out:
            out.write(orjson.dumps({"block_size": self.block_tokens}) + b"\n")
            for request in self._in_order():
                out.write(_fitted(request, self.block_tokens, self.tokens_per_estimate))

    def _in_order(self) -> Iterator[Request]:
        decoder = msgspec.json.Decoder(Request)
        for _, place in sorted(self._places):
            self._file.seek(place)
            yield decoder.decode(self._file.readline())


def _fitted(request: Request, block_tokens: int, ratio: float) -> bytes:
    tokens, blocks = request.prompt_tokens or round(request.input_length * ratio), len(request.hash_ids)
    if blocks:
        tokens = min(max(tokens, (blocks - 1) * block_tokens + 1), blocks * block_tokens)
    fields = {
        "timestamp": request.timestamp,
        "input_length": max(tokens, 1),
        "output_length": request.output_length,
        "hash_ids": request.hash_ids,
        "model": request.model,
        "stream": request.stream,
    }
    return orjson.dumps(fields) + b"\n"


@contextmanager
def _compressed(target: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    if target.suffix != ".gz":
        yield file
        return
    with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
        yield cast(BinaryIO, packed)


def _create(path: Path, *, may_replace: bool, mode: str) -> BinaryIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if may_replace else os.O_EXCL)
    return cast(BinaryIO, open(os.open(path, flags, 0o600), mode))
