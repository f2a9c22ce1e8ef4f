"""What the retransmission engine has done since the store was opened."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import msgspec

from pointsman.daemon.stores.results import Code


class Totals(msgspec.Struct, frozen=True):
    """Only ever grow. A key that failed twice and then went through is 2 retried and 1 recovered."""

    keys: Mapping[str, int] = {}
    """asked for, by operation"""
    retried: int = 0
    recovered: int = 0
    exhausted: int = 0
    """gave up on, though trying again might have helped: retries, time or the caller's patience ran out"""
    failures: Mapping[tuple[str, Code], int] = {}
    """by operation and code, every attempt counted; "missing" included"""

    def since(self, before: Totals) -> Totals:
        """What has come since then."""
        failures = {key: count - before.failures.get(key, 0) for key, count in self.failures.items()}
        return Totals(
            {operation: count - before.keys.get(operation, 0) for operation, count in self.keys.items()},
            self.retried - before.retried,
            self.recovered - before.recovered,
            self.exhausted - before.exhausted,
            {key: count for key, count in failures.items() if count},
        )


class Counters:
    """Written by the engine's threads, read by whoever shows metrics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: Counter[str] = Counter()
        self._retried = 0
        self._recovered = 0
        self._exhausted = 0
        self._failures: Counter[tuple[str, Code]] = Counter()

    def add(
        self, operation: str, *, keys: int, retried: int, recovered: int, exhausted: int, failures: Mapping[Code, int]
    ) -> None:
        with self._lock:
            self._keys[operation] += keys
            self._retried += retried
            self._recovered += recovered
            self._exhausted += exhausted
            for code, count in failures.items():
                self._failures[operation, code] += count

    def totals(self) -> Totals:
        with self._lock:
            return Totals(dict(self._keys), self._retried, self._recovered, self._exhausted, dict(self._failures))
