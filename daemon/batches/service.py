"""Everything that the batch runner does beside answering HTTP: owns the batches' tasks, cleans up, keeps the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from pointsman.daemon.batches.allowance import Allowance
from pointsman.daemon.batches.concurrency import TICK_S, Concurrency
from pointsman.daemon.batches.dataport import DataPort
from pointsman.daemon.batches.files import FileReader, chunk_keys, wall_s
from pointsman.daemon.batches.lifecycle import Event
from pointsman.daemon.batches.live import Live
from pointsman.daemon.batches.payloads import Payloads, StoreTrouble
from pointsman.daemon.batches.recorder import Recorder
from pointsman.daemon.batches.rows import BatchRow, NewBatch
from pointsman.daemon.batches.runner import BatchTask, Parts
from pointsman.daemon.batches.shelf import Shelf
from pointsman.daemon.batches.tally import Tally
from pointsman.daemon.batches.validation import Limits
from pointsman.daemon.telemetry.logs import log

CLEAN_S = 1.0
TIDY_EVERY_S = 60.0
SETTLE_TURNS = 8
"""of the event loop, at a stop: from an answer's end to its line in the recorder's hands"""
DROPPED_FILES = 16
"""deleted in one go"""


def make_parts(
    shelf: Shelf,
    files: Payloads,
    results: Payloads,
    port: DataPort,
    tally: Tally,
    limits: Limits,
    *,
    concurrency: int,
    attempts: int,
) -> Parts:
    """`concurrency`: requests under way at once, at most; `attempts`: of a line."""
    return Parts(
        shelf=shelf,
        files=files,
        results=results,
        reader=FileReader(files),
        recorder=Recorder(shelf, results),
        port=port,
        allowance=Allowance(Concurrency(concurrency)),
        tally=tally,
        limits=limits,
        attempts=attempts,
        open_lines=asyncio.Semaphore(2 * concurrency),
    )


class Service:
    def __init__(self, parts: Parts, ttl_s: int, live: Callable[[], Live] = Live) -> None:
        """`ttl_s`: how long batches, and files without a time of their own, are kept; 0 = for ever."""
        self.parts = parts
        self._ttl_s = ttl_s
        self._live = live
        self._batches: dict[str, BatchTask] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """set to what has failed: the process had better be replaced"""

    async def start(self) -> None:
        """Goes on where the ledger stands. Raises StoreTrouble."""
        shelf, ledger = self.parts.shelf, self.parts.shelf.ledger
        await shelf.do(ledger.drop_unfinished_files)
        self._spawn("recorder", self.parts.recorder.run())
        self._spawn("clock", self._keep_time())
        self._spawn("cleaning", self._clean())
        for batch in (*await shelf.do(ledger.running_batches), *await shelf.do(ledger.finished_with_lines)):
            self._run(batch)

    async def add(self, new: NewBatch, most_running: int = 0) -> BatchRow:
        """Raises QuotaError, as `Ledger.add_batch`."""
        batch = await self.parts.shelf.do(self.parts.shelf.ledger.add_batch, new, wall_s(), most_running)
        self._run(batch)
        return batch

    async def cancel(self, id: str) -> BatchRow:
        """Raises NotPossible."""
        shelf = self.parts.shelf
        batch = await shelf.do(shelf.ledger.advance, id, Event.CANCEL, wall_s())
        if task := self._batches.get(id):
            task.interrupt()
        return batch

    def trouble(self, id: str) -> str:
        """Why nothing goes on with a running batch; empty = it does."""
        task = self._batches.get(id)
        return "" if task is None else task.trouble or self.parts.recorder.paused

    async def stop(self, grace_s: float) -> None:
        """Nothing new is begun; what ends within `grace_s` is kept, the rest stays pending."""
        allowance, recorder = self.parts.allowance, self.parts.recorder
        allowance.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await allowance.emptied()
                for _ in range(SETTLE_TURNS):
                    await asyncio.sleep(0)
                await recorder.drained()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    async def until_done(self, id: str) -> None:
        """Until a batch is final and cleaned up, if this process has it. Raises whatever has ended its task."""
        for task in list(self._tasks):
            if task.get_name() == id:
                await task

    def _run(self, batch: BatchRow) -> None:
        task = self._batches[batch.id] = BatchTask(self.parts, batch.id)
        self._spawn(batch.id, self._until_final(batch.id, task))

    async def _until_final(self, id: str, task: BatchTask) -> None:
        try:
            await task.run()
        finally:
            self._batches.pop(id, None)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log("task_failed", level="error", task=task.get_name(), reason=repr(error))
            if not self.failed.done():
                self.failed.set_result(task.get_name())

    async def _keep_time(self) -> None:
        parts = self.parts
        while True:
            parts.allowance.tick(time.monotonic(), self._live())
            parts.tally.show(
                batches=len(self._batches),
                in_flight=parts.allowance.in_flight,
                limit=parts.allowance.limit,
                is_paused=any(map(self.trouble, self._batches)),
            )
            for payloads in parts.stores:
                parts.tally.transferred(payloads.news())
            await asyncio.sleep(TICK_S)

    async def _clean(self) -> None:
        next_tidying = 0.0
        while True:
            try:
                if time.monotonic() >= next_tidying:
                    next_tidying = time.monotonic() + TIDY_EVERY_S
                    await self._tidy()
                await self._delete_dropped()
            except StoreTrouble as error:
                log("cleaning_failed", level="warning", reason=str(error))
            await asyncio.sleep(CLEAN_S)

    async def _tidy(self) -> None:
        shelf, ledger = self.parts.shelf, self.parts.shelf.ledger
        await shelf.do(ledger.drop_expired_files, wall_s())
        if self._ttl_s:
            await shelf.do(ledger.forget_batches, wall_s() - self._ttl_s)
        await shelf.do(ledger.tidy)
        for payloads in self.parts.stores:
            await payloads.tidy()

    async def _delete_dropped(self) -> None:
        shelf, ledger = self.parts.shelf, self.parts.shelf.ledger
        for file in await shelf.do(ledger.dropped_files, DROPPED_FILES):
            await self.parts.files.delete(chunk_keys(file))
            await shelf.do(ledger.forget_file, file.id)
