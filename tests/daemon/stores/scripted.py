"""A backend that does what its script says, and a clock that only moves when somebody sleeps."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from pointsman.daemon.stores.cancellation import Cancellation
from pointsman.daemon.stores.codes import CodeTable
from pointsman.daemon.stores.framing import Buffer, Frame
from pointsman.daemon.stores.results import MISSING, OK_NONE, Code, Failure, Ok, Stat, Written

CODES = CodeTable(
    invalid=frozenset({-600}),
    no_space=frozenset({-200}),
    corrupt=frozenset({-801}),
    missing=frozenset({-704}),
    is_no_space_retried=True,
    is_corrupt_retried=True,
)

Cut = Callable[[bytes], bytes]


class VirtualClock:
    def __init__(self) -> None:
        self.time_s = 1000.0
        self.pauses: list[float] = []
        self.on_sleep: Callable[[Cancellation], None] = lambda cancellation: None

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float, cancellation: Cancellation) -> None:
        self.pauses.append(seconds)
        self.time_s += seconds
        self.on_sleep(cancellation)


class ScriptedBackend:
    """In memory. `script[key]` is a list of codes that its next attempts fail with, whatever the operation."""

    name = "scripted"
    codes = CODES
    threads = 1
    max_value_bytes = 1 << 20
    is_volatile = False

    def __init__(self) -> None:
        self.frames: dict[str, bytes] = {}
        self.script: defaultdict[str, list[Code]] = defaultdict(list)
        self.misreads: defaultdict[str, list[Cut]] = defaultdict(list)
        """what the next reads of a key make of its frame"""
        self.wrong_lengths: list[int] = []
        """added to the number of results of the next calls"""
        self.on_batch: Callable[[Sequence[str]], None] = lambda keys: None
        self.batches: list[list[str]] = []
        self.sent: list[tuple[str, int]] = []
        """(key, identity of the frame's payload) of every attempt to write"""
        self.is_closed = False
        self.tidied = 0
        self._lock = threading.Lock()

    def put_batch(
        self, keys: Sequence[str], frames: Sequence[Frame], ttl_s: float | None, timeout_s: float
    ) -> list[Ok[Written] | Failure]:
        by_key = dict(zip(keys, frames, strict=True))

        def put(key: str) -> Ok[Written]:
            self.frames[key] = by_key[key].join()
            return Ok(Written())

        self.sent += [(key, id(frame.payload)) for key, frame in by_key.items()]
        return self._answer(keys, put, is_write=True)

    def get_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Buffer] | Failure]:
        def get(key: str) -> Ok[Buffer] | Failure:
            if key not in self.frames:
                return MISSING
            frame = self.frames[key]
            return Ok(self.misreads[key].pop(0)(frame) if self.misreads[key] else frame)

        return self._answer(keys, get)

    def delete_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[None] | Failure]:
        return self._answer(keys, lambda key: OK_NONE if self.frames.pop(key, None) else MISSING)

    def stat_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Stat] | Failure]:
        return self._answer(keys, lambda key: Ok(Stat(len(self.frames[key]))) if key in self.frames else MISSING)

    def tidy(self) -> None:
        self.tidied += 1

    def close(self) -> None:
        self.is_closed = True

    def _answer(self, keys: Sequence[str], work: Callable[[str], Any], *, is_write: bool = False) -> list[Any]:
        with self._lock:
            self.batches.append(list(keys))
            wrong = self.wrong_lengths.pop(0) if self.wrong_lengths else 0
        self.on_batch(keys)
        results = [
            self.codes.judge(self.script[key].pop(0), is_write=is_write) if self.script[key] else work(key)
            for key in keys
        ]
        return (results + results[:wrong])[: len(keys) + wrong]
