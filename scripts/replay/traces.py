"""Reads workload traces: JSON lines, plain or gzip'd.

An optional first line `{"block_size": N}` (tokens, default 512), then one request a line: `timestamp` (ms from the
start), `input_length`, `output_length` (tokens), `hash_ids` (prefix-chained block ids, the last may be partial),
`session`, `parent` and `delay` (a request that must end first, and seconds of think time after it). Unknown keys are
ignored. The format is that of Mooncake's traces, with sessions added.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec

from pointsman.daemon.errors import ConfigError, ConfigErrors

DEFAULT_BLOCK_TOKENS = 512


class TraceRequest(msgspec.Struct, frozen=True):
    input_length: int
    output_length: int
    timestamp: float = 0.0
    hash_ids: tuple[int, ...] = ()
    session: int | None = None
    parent: int | None = None
    delay: float = 0.0


class _Header(msgspec.Struct):
    block_size: int | None = None
    input_length: int | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]

    @property
    def is_closed_loop(self) -> bool:
        """Turns follow the previous one's end instead of a clock."""
        return any(request.parent is not None for request in self.requests)


def read_trace(path: Path) -> Trace:
    """Raises ConfigErrors, with the line, when the file cannot be read or is not a trace."""
    block_tokens = DEFAULT_BLOCK_TOKENS
    requests: list[TraceRequest] = []
    decoder = msgspec.json.Decoder(TraceRequest)
    for number, line in _lines(path):
        try:
            if number == 1 and (header := msgspec.json.decode(line, type=_Header)).input_length is None:
                block_tokens = header.block_size or DEFAULT_BLOCK_TOKENS
                continue
            requests.append(_checked(decoder.decode(line), len(requests)))
        except (msgspec.DecodeError, ValueError) as error:
            raise _refused(path, f"not a trace: {error}", number) from None
    if not requests:
        raise _refused(path, "the trace has no requests")
    return Trace(path.name.removesuffix(".gz").removesuffix(".jsonl"), block_tokens, tuple(requests))


def spread(times: Sequence[float], random: Random) -> list[float]:
    """Arrivals stamped with the same time are drawn uniformly over the gap to the next stamp."""
    stamps = sorted(set(times))
    gaps = {stamp: later - stamp for stamp, later in pairwise(stamps)}
    gaps[stamps[-1]] = gaps.get(stamps[-2], 0.0) if len(stamps) > 1 else 0.0
    counts = Counter(times)
    return sorted(time + (random.random() * gaps[time] if counts[time] > 1 else 0.0) for time in times)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as probe:
            is_gzip = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise _refused(path, f"cannot be read: {reason}") from None


def _checked(request: TraceRequest, number: int) -> TraceRequest:
    if request.input_length < 1 or request.output_length < 0:
        raise ValueError("input_length is at least 1, output_length at least 0")
    if request.parent is not None and not 0 <= request.parent < number:
        raise ValueError("parent is the number of an earlier request")
    return request


def _refused(path: Path, problem: str, line: int = 0) -> ConfigErrors:
    return ConfigErrors([ConfigError(str(path), problem, line=line)])
