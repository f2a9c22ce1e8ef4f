"""The payload store as the event loop uses it: calls in threads, and three ways in which a call can fail.

The store's engine has retried already when one of these is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.stores.blob_store import BlobStore
from pointsman.daemon.stores.counters import Totals
from pointsman.daemon.stores.results import Corrupt, Failure, Missing, NoSpace, Ok, name_some

R = TypeVar("R")
THREADS = 4
DELETE_KEYS = 400


class StoreTrouble(PointsmanError):
    """It did not work now, and may work later. `reason`: one word, for status and metrics."""

    reason = "store_unavailable"


class StoreFull(StoreTrouble):
    reason = "no_space"


class PayloadLost(PointsmanError):
    """The store has answered that it does not have these values, or has something else in their place."""

    def __init__(self, keys: Sequence[str], detail: str) -> None:
        self.keys = list(keys)
        super().__init__(f"the payload store has lost {len(self.keys)} values: {detail}")


class Payloads:
    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._told = Totals()
        self._threads = ThreadPoolExecutor(THREADS, "store")

    async def put(self, values: dict[str, bytes], timeout_s: float | None = None) -> None:
        """All of them. Raises StoreTrouble."""
        keys = list(values)
        _raise_trouble(keys, await self._call(self._store.put_many, keys, list(values.values()), timeout_s=timeout_s))

    async def put_some(self, values: dict[str, bytes], timeout_s: float) -> dict[str, Failure]:
        """The keys that failed, with their last results."""
        keys = list(values)
        results = await self._call(self._store.put_many, keys, list(values.values()), timeout_s=timeout_s)
        return {key: result for key, result in zip(keys, results, strict=True) if not isinstance(result, Ok)}

    async def get(self, keys: Sequence[str]) -> list[bytes]:
        """All of them. Raises StoreTrouble, PayloadLost."""
        found = await self.find(keys)
        lost = [key for key, value in zip(keys, found, strict=True) if value is None]
        if lost:
            raise PayloadLost(lost, ", ".join(lost[:4]))
        return [value for value in found if value is not None]

    async def find(self, keys: Sequence[str]) -> list[bytes | None]:
        """None for what the store certainly does not have (any more). Raises StoreTrouble."""
        results = await self._call(self._store.get_many, keys)
        _raise_trouble(keys, [MISSING if isinstance(result, Corrupt) else result for result in results])
        return [bytes(r.value) if isinstance(r, Ok) and isinstance(r.value, bytes) else None for r in results]

    async def existing(self, keys: Sequence[str]) -> list[bool]:
        """Raises StoreTrouble."""
        results = await self._call(self._store.stat_many, keys)
        _raise_trouble(keys, [MISSING if isinstance(result, Corrupt) else result for result in results])
        return [isinstance(result, Ok) for result in results]

    async def delete(self, keys: Sequence[str]) -> None:
        """Those that exist. Raises StoreTrouble."""
        for start in range(0, len(keys), DELETE_KEYS):
            some = keys[start : start + DELETE_KEYS]
            _raise_trouble(some, await self._call(self._store.delete_many, some))

    async def tidy(self) -> None:
        await self._call(self._store.tidy)

    def news(self) -> Totals:
        """What the store has done since the last call of this method."""
        before, self._told = self._told, self._store.totals()
        return self._told.since(before)

    def close(self) -> None:
        self._store.close()
        self._threads.shutdown()

    async def _call(self, call: Callable[..., R], *arguments: object, **options: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*arguments, **options))


MISSING = Missing()


def _raise_trouble(keys: Sequence[str], results: Sequence[Ok[object] | Failure]) -> None:
    """Missing is none."""
    failed = {k: r for k, r in zip(keys, results, strict=True) if not isinstance(r, Ok | Missing)}
    if failed:
        kind = StoreFull if any(isinstance(result, NoSpace) for result in failed.values()) else StoreTrouble
        raise kind(f"{len(failed)} of {len(keys)} keys failed: {name_some(failed.items())}")
