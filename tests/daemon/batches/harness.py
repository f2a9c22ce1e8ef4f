"""A batch service on real SQLite files in a folder, with a gateway that is a function, and crashes at chosen moments.

A crash is an exception that no code of ours handles, raised before or after the n-th step takes place: every call of
the ledger and of the store is a step. Whoever crashed is thrown away, as its memory would be; the files stay.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pointsman.daemon.batches.attempts import Answer, Unreachable
from pointsman.daemon.batches.dataport import DataPort
from pointsman.daemon.batches.files import FileWriter
from pointsman.daemon.batches.ledger import Ledger
from pointsman.daemon.batches.lifecycle import FINAL
from pointsman.daemon.batches.payloads import Payloads
from pointsman.daemon.batches.rows import BatchRow, FileRow, NewBatch
from pointsman.daemon.batches.service import Service, make_parts
from pointsman.daemon.batches.shelf import Shelf
from pointsman.daemon.batches.tally import Tally
from pointsman.daemon.batches.validation import Limits
from pointsman.daemon.stores.blob_store import Backend
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from pointsman.daemon.stores.sqlite_store import SqliteBackend

OWNER = "somebody"
CHAT = "/v1/chat/completions"
QUICK = Policy(retries=1, base_s=0.001, max_pause_s=0.001)
STEPS = ("put_batch", "get_batch", "delete_batch", "stat_batch")
WAIT_S = 60.0


class Crash(BaseException):
    """The process is gone."""


class Fate:
    """When the next crash comes."""

    def __init__(self) -> None:
        self.at_step: int | None = None
        self.is_after = False
        """the step still takes place"""
        self.steps = 0
        self.has_struck = False

    def step(self, work: Callable[[], Any]) -> Any:
        self.steps += 1
        if self.has_struck:
            raise Crash
        if self.steps != self.at_step:
            return work()
        self.has_struck = True
        if self.is_after:
            work()
        raise Crash


class FatefulBackend:
    """Every call of a store is a step."""

    def __init__(self, backend: Backend, fate: Fate) -> None:
        self._backend = backend
        self._fate = fate

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in STEPS:
            return found
        return lambda *arguments: self._fate.step(lambda: found(*arguments))


class FatefulShelf(Shelf):
    """Every call of the ledger is a step."""

    def __init__(self, ledger: Ledger, fate: Fate) -> None:
        super().__init__(ledger)
        self._fate = fate

    async def do(self, call: Any, *arguments: Any, **options: Any) -> Any:
        return await super().do(lambda: self._fate.step(lambda: call(*arguments, **options)))


class Gateway(DataPort):
    """Answers at once, or as told; knows what it was asked."""

    def __init__(self) -> None:
        self.trouble = ""
        self.asked: Counter[str] = Counter()
        self.answers: dict[str, list[Answer | Unreachable]] = {}
        """by prompt, what the next attempts get"""
        self.most_at_once = 0
        self.order: list[str] = []
        self.hold: asyncio.Event | None = None
        self._now = 0

    async def send(self, path: str, body: bytes, request_id: str, key: str | None) -> Answer | Unreachable:
        prompt = json.loads(body)["messages"][0]["content"]
        self.asked[prompt] += 1
        self.order.append(prompt)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            if self.hold is not None:
                await self.hold.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self._now -= 1
        told = self.answers.get(prompt)
        if told:
            return told.pop(0)
        return Answer(200, request_id, json.dumps({"choices": [{"message": {"content": prompt}}]}).encode())

    async def close(self) -> None:
        return


class Life:
    """One process: from its start until it is stopped, or crashes."""

    def __init__(
        self,
        folder: Path,
        gateway: Gateway,
        fate: Fate | None = None,
        backend: Backend | None = None,
        results: Backend | None = None,
    ) -> None:
        """`results`: a store of their own for them."""
        self.fate = fate or Fate()
        self.gateway = gateway
        self.backend = backend or SqliteBackend(folder / "payloads.db", synchronous="normal")
        self.ledger = Ledger(folder / "ledger.db")
        self.shelf = FatefulShelf(self.ledger, self.fate)
        store = RetransmittingStore(cast(Backend, FatefulBackend(self.backend, self.fate)), QUICK)
        self.payloads = Payloads(store)
        self.results = self.payloads if results is None else Payloads(RetransmittingStore(results, QUICK))
        parts = make_parts(
            self.shelf, self.payloads, self.results, gateway, Tally(), Limits(1000, 100_000), concurrency=8, attempts=3
        )
        self.service = Service(parts, ttl_s=0)

    async def submit(self, data: bytes, window_s: int = 3600) -> BatchRow:
        file = await self.upload(data)
        new = NewBatch(
            id=f"batch_{file.serial}",
            owner=OWNER,
            input_file=file.id,
            endpoint=CHAT,
            completion_window="1h",
            window_s=window_s,
            metadata=None,
            output_ttl_s=None,
        )
        return await self.service.add(new)

    async def upload(self, data: bytes) -> FileRow:
        writer = FileWriter(self.shelf, self.payloads)
        await writer.begin(OWNER, "in.jsonl", "batch")
        await writer.write(data)
        return await writer.finish("batch", "in.jsonl", None)

    async def until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not await holds():
                if self.service.failed.done():
                    raise Crash
                await asyncio.sleep(0.002)

    async def look(self, call: Any, *arguments: Any) -> Any:
        """At the ledger, without taking a step."""
        return await Shelf.do(self.shelf, call, *arguments)

    async def until_final(self, batch_id: str) -> BatchRow:
        """And cleaned up. Raises Crash when that comes first."""

        async def is_over() -> bool:
            batch: BatchRow = await self.look(self.ledger.batch, batch_id)
            return batch.status in FINAL and not await self.look(self.ledger.first_lines, batch.serial, 1)

        await self.until(is_over)
        batch: BatchRow = await self.look(self.ledger.batch, batch_id)
        return batch

    def stored_keys(self) -> int:
        assert isinstance(self.backend, SqliteBackend)
        return self.backend.usage().keys

    async def content(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = await self.look(self.ledger.file, file_id, OWNER)
        assert file is not None
        pieces = [piece async for piece in self.service.parts.reader.stream(file)]
        return [json.loads(line) for line in b"".join(pieces).splitlines()]

    async def end(self) -> None:
        """However it ended: its memory is gone, its files are free for the next one."""
        for task in list(self.service._tasks):
            task.cancel()
            with suppress(asyncio.CancelledError, Crash, Exception):
                await task
        self.fate.has_struck = True
        if self.service.failed.done():
            self.service.failed.result()
        self.shelf._thread.shutdown(wait=True, cancel_futures=True)
        for payloads in (self.payloads, self.results):
            payloads._threads.shutdown(wait=True, cancel_futures=True)
        with suppress(sqlite3.Error):
            self.ledger.close()
        self.backend.close()


def jsonl(prompts: Sequence[str]) -> bytes:
    lines = [
        {
            "custom_id": f"id-{n}",
            "method": "POST",
            "url": CHAT,
            "body": {"model": "m", "messages": [{"role": "user", "content": prompt}]},
        }
        for n, prompt in enumerate(prompts)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
