"""A backend in front of another one, whose attempts fail as its script says; what passes is the real thing's answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from pointsman.daemon.stores.blob_store import Backend
from pointsman.daemon.stores.framing import Buffer, Frame
from pointsman.daemon.stores.results import Code, Failure, Ok, Stat, Written


class FaultyBackend:
    """`script[key]`: codes that its next attempts get, whatever the operation, without reaching the real backend."""

    def __init__(self, real: Backend) -> None:
        self._real = real
        self.name, self.codes, self.threads = real.name, real.codes, real.threads
        self.max_value_bytes, self.is_volatile = real.max_value_bytes, real.is_volatile
        self.script: defaultdict[str, list[Code]] = defaultdict(list)
        self.misreads: defaultdict[str, list[Callable[[bytes], bytes]]] = defaultdict(list)
        """what the next reads of a key make of its frame"""
        self.wrong_lengths: list[int] = []
        """added to the number of results of the next attempts"""
        self.defects: list[Exception] = []
        """raised by the next attempts, when the real one is through"""
        self.on_batch: Callable[[], None] = lambda: None
        self.batches: list[list[str]] = []

    def put_batch(
        self, keys: Sequence[str], frames: Sequence[Frame], ttl_s: float | None, timeout_s: float
    ) -> list[Ok[Written] | Failure]:
        by_key = dict(zip(keys, frames, strict=True))

        def put(some: list[str]) -> list[Any]:
            return list(self._real.put_batch(some, [by_key[key] for key in some], ttl_s, timeout_s))

        return self._attempt(keys, put, is_write=True)

    def get_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Buffer] | Failure]:
        def get(some: list[str]) -> list[Any]:
            return [
                self._misread(key, found)
                for key, found in zip(some, self._real.get_batch(some, timeout_s), strict=True)
            ]

        return self._attempt(keys, get)

    def delete_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[None] | Failure]:
        return self._attempt(keys, lambda some: list(self._real.delete_batch(some, timeout_s)))

    def stat_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Stat] | Failure]:
        return self._attempt(keys, lambda some: list(self._real.stat_batch(some, timeout_s)))

    def tidy(self) -> None:
        self._real.tidy()

    def close(self) -> None:
        self._real.close()

    def _misread(self, key: str, found: Ok[Buffer] | Failure) -> Ok[Buffer] | Failure:
        if isinstance(found, Ok) and self.misreads[key]:
            return Ok(self.misreads[key].pop(0)(bytes(found.value)))
        return found

    def _attempt(
        self, keys: Sequence[str], work: Callable[[list[str]], list[Any]], *, is_write: bool = False
    ) -> list[Any]:
        self.batches.append(list(keys))
        self.on_batch()
        failed = {key: self.codes.judge(self.script[key].pop(0), is_write=is_write) for key in keys if self.script[key]}
        passed = [key for key in keys if key not in failed]
        results = failed | dict(zip(passed, work(passed) if passed else [], strict=True))
        if self.defects:
            raise self.defects.pop(0)
        answers = [results[key] for key in keys]
        wrong = self.wrong_lengths.pop(0) if self.wrong_lengths else 0
        return (answers + answers[:wrong])[: len(keys) + wrong]
