"""A trace file as a load: its arrivals, its lengths, and prompts that begin alike where the trace says so.

A block id becomes text that is always the same for that id, of BYTES_PER_TOKEN bytes a token. So prompts share what
they shared, and nothing of the original text is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from pointsman.daemon.bench.arrivals import Follower, Pattern, arrivals
from pointsman.daemon.bench.dialects import Ask
from pointsman.daemon.bench.workloads import BYTES_PER_TOKEN
from pointsman.scripts.replay.traces import Trace, TraceRequest, spread

_ALPHABET = b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"
_KEPT_BLOCKS = 20_000


class TraceLoad:
    """`timed` and `followers` are what `OpenLoop` takes."""

    def __init__(
        self,
        trace: Trace,
        *,
        seed: int,
        is_stream: bool,
        speed: float = 1.0,
        per_s: float | None = None,
        pattern: Pattern = "poisson",
        limit: int | None = None,
        most_tokens: int | None = None,
    ) -> None:
        """`per_s`: requests (of a trace of sessions: sessions) a second instead of the recorded times, ValueError if a
        trace without times has none. `speed` 2.0 is twice as fast, `limit` the first so many requests, `most_tokens`
        cuts answers."""
        self._trace = trace
        self._seed = seed
        self._is_stream = is_stream
        self._most_tokens = most_tokens
        self._blocks: dict[int, bytes] = {}
        self._requests = trace.requests[:limit]
        if per_s is None and trace.is_closed_loop:
            raise ValueError(f"{trace.name} has sessions instead of times: --rate says how many begin a second")
        roots = [number for number, request in enumerate(self._requests) if request.parent is None]
        self._children: dict[int, list[int]] = {}
        for number, request in enumerate(self._requests):
            if request.parent is not None:
                self._children.setdefault(request.parent, []).append(number)
        random = Random(seed)
        if per_s is not None:
            self._starts = list(zip(arrivals(pattern, per_s, random), roots, strict=False))
        else:
            roots.sort(key=lambda number: self._requests[number].timestamp)
            times = spread([self._requests[number].timestamp / 1e3 for number in roots], random)
            self._starts = [((time - times[0]) / speed, number) for time, number in zip(times, roots, strict=True)]
        self._speed = speed

    def __len__(self) -> int:
        return len(self._requests)

    def timed(self) -> Iterator[tuple[float, int, Ask]]:
        for at_s, number in self._starts:
            yield at_s, number, self._ask(number)

    def followers(self, number: int) -> list[Follower]:
        return [
            Follower(child, self._ask(child), self._requests[child].delay / self._speed)
            for child in self._children.get(number, ())
        ]

    def _ask(self, number: int) -> Ask:
        request = self._requests[number]
        tokens = max(request.output_length, 1)
        if self._most_tokens is not None:
            tokens = min(tokens, self._most_tokens)
        return Ask(self._prompt(number, request), tokens, self._is_stream)

    def _prompt(self, number: int, request: TraceRequest) -> bytes:
        size = request.input_length * BYTES_PER_TOKEN
        if not request.hash_ids:  # no prefix data: a prompt of its own
            return _text(f"{self._seed}:alone:{number}", size)
        text = b"".join(map(self._block, request.hash_ids))
        if len(text) < size:  # longer than its blocks can hold
            text += _text(f"{self._seed}:rest:{number}", size - len(text))
        return text[:size]

    def _block(self, block: int) -> bytes:
        text = self._blocks.get(block)
        if text is None:
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.clear()
            text = self._blocks[block] = _text(f"{self._seed}:{block}", self._trace.block_tokens * BYTES_PER_TOKEN)
        return text


_TABLE = bytes(_ALPHABET[byte % len(_ALPHABET)] for byte in range(256))


def _text(seed: str, size: int) -> bytes:
    return Random(seed).randbytes(size).translate(_TABLE)
