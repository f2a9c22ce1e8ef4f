"""The ledger as the event loop uses it: one thread, one call after the other."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pointsman.daemon.batches.ledger import Ledger
from pointsman.daemon.batches.payloads import StoreFull, StoreTrouble

P = ParamSpec("P")
R = TypeVar("R")
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC")


class Shelf:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._thread = ThreadPoolExecutor(1, "ledger")

    async def do(self, call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Runs a method of the ledger. Raises what it raises; StoreTrouble where the disk refuses."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, lambda: call(*arguments, **options))
        except sqlite3.OperationalError as error:
            kind = StoreFull if getattr(error, "sqlite_errorname", "") in _FULL else StoreTrouble
            raise kind(f"the ledger: {error}") from error

    def close(self) -> None:
        """After the calls under way."""
        self._thread.shutdown()
        self.ledger.close()
