"""Runs batches: one task for each that is not final, all of them sharing one allowance of lines under way.

Theory of operation. The ledger says in which status a batch is; its task does what that status asks for, tells the
ledger what came of it, and looks again:

    validating    read the input, write its lines to the ledger
    in_progress   run the pending lines, in the order of their groups
    finalizing, cancelling    write the files, make them visible
    final         delete the results, then the lines

Everything can be done twice, so a start simply goes on where the ledger stands. What stops the disk or the store stops
a batch: its task waits and tries again.

Two bounds. `Allowance` is how many requests are at the data port at once: what `concurrency` allows. The open lines,
those that wait for a retry or for the disk included, are at most twice the largest allowance: that bounds the memory.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from pointsman.daemon.batches import output_lines
from pointsman.daemon.batches.allowance import Allowance
from pointsman.daemon.batches.assembly import Assembly, ResultsLost
from pointsman.daemon.batches.attempts import Again, Answer, Failed, judge
from pointsman.daemon.batches.dataport import DataPort
from pointsman.daemon.batches.files import FileReader, wall_s
from pointsman.daemon.batches.input_lines import request_body
from pointsman.daemon.batches.lifecycle import Event, NotPossible, Status
from pointsman.daemon.batches.output_lines import LineError
from pointsman.daemon.batches.owners import key_of
from pointsman.daemon.batches.payloads import PayloadLost, Payloads, StoreTrouble
from pointsman.daemon.batches.recorder import Recorder, Result, result_key
from pointsman.daemon.batches.rows import BatchRow, DoneLine, FileRow, LineRow
from pointsman.daemon.batches.shelf import Shelf
from pointsman.daemon.batches.tally import Tally
from pointsman.daemon.batches.validation import Limits, Validation
from pointsman.daemon.telemetry.logs import log

T = TypeVar("T")
PAGE = 200
"""lines fetched from the ledger at once"""
PAUSE_S = 1.0
"""after trouble with the disk or the store"""
CLEAN_KEYS = 400


class Parts(msgspec.Struct, frozen=True):
    """What all batches share."""

    shelf: Shelf
    files: Payloads
    """uploads, outputs"""
    results: Payloads
    """what lines were answered, until the outputs are written; may be the same store"""
    reader: FileReader
    recorder: Recorder
    port: DataPort
    allowance: Allowance
    tally: Tally
    limits: Limits
    attempts: int
    """of a line that fails by what may be its own fault"""
    open_lines: asyncio.Semaphore

    @property
    def stores(self) -> set[Payloads]:
        return {self.files, self.results}


class BatchTask:
    """One batch, from wherever the ledger says it is to its end."""

    def __init__(self, parts: Parts, id: str) -> None:
        self._parts = parts
        self._id = id
        self._interrupted = asyncio.Event()
        """cancelled by its owner, or its window is over: what runs is to stop"""
        self._lines: set[asyncio.Task[None]] = set()
        self._questions: set[asyncio.Task[tuple[Answer | None, LineError | None]]] = set()
        """of these lines, those that have no answer yet: they may be cancelled"""
        self._defect: BaseException | None = None
        """that ended the task of a line: ours, so this process is replaced"""
        self.trouble = ""
        """why nothing goes on; empty = it does"""

    async def run(self) -> None:
        await self._patiently(self._reconcile)
        while not await self._patiently(self._step):
            pass

    async def _step(self) -> bool:
        """What the ledger's status asks for; returns whether nothing is left to do."""
        shelf = self._parts.shelf
        batch = await shelf.do(shelf.ledger.batch, self._id)
        if batch is None:
            return True
        try:
            match batch.status:
                case Status.VALIDATING:
                    await self._validate(batch)
                case Status.IN_PROGRESS:
                    await self._run_lines(batch)
                case Status.FINALIZING | Status.CANCELLING:
                    await self._finalize(batch)
                case _:
                    await self._clean(batch)
                    return True
        except NotPossible as error:  # it was cancelled meanwhile: look again
            log("batch_looks_again", level="debug", batch=batch.id, reason=str(error))
        return False

    def interrupt(self) -> None:
        self._interrupted.set()

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Until it works: neither a full disk nor a store that is away ends a batch."""
        while True:
            try:
                found = await work()
            except StoreTrouble as error:
                if not self.trouble:
                    log("batch_paused", level="warning", batch=self._id, reason=str(error))
                self.trouble = error.reason
                await asyncio.sleep(PAUSE_S)
            else:
                if self.trouble:
                    log("batch_resumed", batch=self._id)
                self.trouble = ""
                return found

    async def _advance(self, event: Event) -> BatchRow:
        shelf = self._parts.shelf
        batch = await shelf.do(shelf.ledger.advance, self._id, event, wall_s())
        log("batch_" + batch.status, batch=self._id)
        return batch

    # --- steps

    async def _reconcile(self) -> None:
        """After a start: results that were stored, but not marked before the end, need not be computed again."""
        parts, ledger = self._parts, self._parts.shelf.ledger
        batch = await parts.shelf.do(ledger.batch, self._id)
        if batch is None or batch.status not in (Status.IN_PROGRESS, Status.CANCELLING, Status.FINALIZING):
            return
        last: LineRow | None = None
        while page := await parts.shelf.do(ledger.pending, batch.serial, last, CLEAN_KEYS):
            last = page[-1]
            exists = await parts.results.existing([result_key(batch.id, line.number) for line in page])
            stored = [line for line, is_there in zip(page, exists, strict=True) if is_there]
            found = await parts.results.find([result_key(batch.id, line.number) for line in stored])
            done = [
                DoneLine(batch.serial, line.number, output_lines.has_succeeded(result))
                for line, result in zip(stored, found, strict=True)
                if result is not None
            ]
            if done:
                await parts.shelf.do(ledger.mark_done, done)

    async def _validate(self, batch: BatchRow) -> None:
        parts, ledger = self._parts, self._parts.shelf.ledger
        file = await parts.shelf.do(ledger.file, batch.input_file, batch.owner)
        validation = Validation(parts.shelf, batch, parts.limits)
        if file is None:
            validation.input_missing()
        else:
            await validation.run(file, parts.reader)
        if validation.problems:
            await parts.shelf.do(ledger.reject, batch.id, validation.errors(), wall_s())
            log("batch_failed", batch=batch.id, problems=len(validation.problems))
            return
        await parts.shelf.do(ledger.start, batch.id, validation.total, wall_s())
        log("batch_in_progress", batch=batch.id, lines=validation.total, endpoint=batch.endpoint)

    async def _run_lines(self, batch: BatchRow) -> None:
        """Until all lines are done, or the batch is interrupted; no line is under way afterwards."""
        timer = asyncio.get_running_loop().call_later(max(0.0, batch.expires_at - time.time()), self.interrupt)
        interrupted = asyncio.create_task(self._interrupted.wait())
        launching = asyncio.create_task(self._launch_all(batch))
        try:
            await asyncio.wait([launching, interrupted], return_when=asyncio.FIRST_COMPLETED)
            launching.cancel()
            while self._lines and not interrupted.done():
                await asyncio.wait([interrupted, *self._lines], return_when=asyncio.FIRST_COMPLETED)
            for question in self._questions:
                question.cancel()
            if self._lines:
                await asyncio.wait(self._lines)
            if not interrupted.done():
                launching.result()
        finally:
            timer.cancel()
            for task in (interrupted, launching, *self._lines):
                task.cancel()
        if self._defect is not None:
            raise self._defect
        if not self._interrupted.is_set():
            await self._advance(Event.ALL_DONE)
            return
        self._interrupted.clear()
        if time.time() >= batch.expires_at:
            await self._advance(Event.WINDOW_OVER)

    async def _launch_all(self, batch: BatchRow) -> None:
        """Raises StoreTrouble; what it has begun goes on."""
        parts, ledger = self._parts, self._parts.shelf.ledger
        file = await parts.shelf.do(ledger.file, batch.input_file, batch.owner)
        last: LineRow | None = None
        while page := await parts.shelf.do(ledger.pending, batch.serial, last, PAGE):
            for line in page:
                await parts.open_lines.acquire()
                task = asyncio.create_task(self._line(batch, file, line))
                self._lines.add(task)
                task.add_done_callback(self._line_ended)
            last = page[-1]

    def _line_ended(self, task: asyncio.Task[None]) -> None:
        self._lines.discard(task)
        self._parts.open_lines.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defect = self._defect or error

    async def _finalize(self, batch: BatchRow) -> None:
        parts, ledger = self._parts, self._parts.shelf.ledger
        if not batch.total:  # cancelled before its input was read to the end
            await parts.shelf.do(ledger.begin_lines, batch.serial)
        assembly = Assembly(parts.shelf, parts.files, parts.results, batch)
        try:
            assembled = await assembly.run()
        except StoreTrouble:
            with suppress(StoreTrouble):  # the next start drops it, too
                await assembly.drop()
            raise
        if isinstance(assembled, ResultsLost):
            await assembly.drop()
            numbers = assembled.numbers
            parts.tally.lost(len(numbers))
            log("results_lost", level="error", batch=batch.id, lines=len(numbers), numbers=numbers[:20])
            await parts.shelf.do(ledger.run_again, batch.id, numbers, wall_s())
            return
        if assembled.given_up:
            parts.tally.lost(len(assembled.given_up))
            await parts.shelf.do(ledger.give_up_results, batch.id, assembled.given_up)
        files = assembled.output_file, assembled.error_file
        done = await parts.shelf.do(ledger.complete, batch.id, *files, assembled.unrun, wall_s())
        parts.tally.unrun(assembled.unrun)
        log("batch_" + done.status, batch=batch.id, completed=done.completed, failed=done.failed, lost=done.lost)

    async def _clean(self, batch: BatchRow) -> None:
        parts, ledger = self._parts, self._parts.shelf.ledger
        while numbers := await parts.shelf.do(ledger.first_lines, batch.serial, CLEAN_KEYS):
            await parts.results.delete([result_key(batch.id, number) for number in numbers])
            await parts.shelf.do(ledger.forget_lines, batch.serial, numbers[-1])

    # --- one line

    async def _line(self, batch: BatchRow, file: FileRow | None, line: LineRow) -> None:
        """Ends when its result is durable, or when its question was cancelled: then it stays pending."""
        question = asyncio.create_task(self._ask(batch, file, line))
        self._questions.add(question)
        try:
            await asyncio.wait([question])
        finally:
            question.cancel()
            self._questions.discard(question)
        if question.cancelled():
            return
        answer, error = _outcome(question)
        result = self._result(batch, line, answer, error)
        if not await self._parts.recorder.record(result):
            error = LineError("result_too_large", "the payload store does not take an answer of this size")
            result = self._result(batch, line, None, error)
            await self._parts.recorder.record(result)
        self._parts.tally.done(has_succeeded=result.has_succeeded)

    def _result(self, batch: BatchRow, line: LineRow, answer: Answer | None, error: LineError | None) -> Result:
        text = output_lines.render(batch.id, line.number, line.custom_id, answer, error)
        return Result(batch.serial, batch.id, line.number, error is None, text)

    async def _ask(
        self, batch: BatchRow, file: FileRow | None, line: LineRow
    ) -> tuple[Answer | None, LineError | None]:
        """(the last answer, why it is no success)."""
        parts = self._parts
        attempts = pauses = 0
        while True:
            async with parts.allowance:
                try:
                    body = await self._body(file, line)
                except PayloadLost as error:
                    return None, LineError("input_lost", str(error))
                request_id = output_lines.line_id(batch.id, line.number)
                outcome = await parts.port.send(batch.endpoint, body, request_id, key_of(batch.owner))
            verdict = judge(outcome, attempts + 1, pauses, parts.attempts, random.random())
            if not isinstance(verdict, Again):
                answer = outcome if isinstance(outcome, Answer) else None
                return answer, LineError(verdict.code, verdict.message) if isinstance(verdict, Failed) else None
            if verdict.costs_attempt:
                attempts += 1
            else:
                parts.allowance.crowded()
            parts.tally.retried()
            pauses += 1
            await asyncio.sleep(verdict.after_s)

    async def _body(self, file: FileRow | None, line: LineRow) -> bytes:
        """Raises PayloadLost."""
        if file is None:
            raise PayloadLost([], "the input file is gone")
        while True:
            try:
                return request_body(await self._parts.reader.read(file, line.place, line.size))
            except StoreTrouble:
                await asyncio.sleep(PAUSE_S)


def _outcome(question: asyncio.Task[tuple[Answer | None, LineError | None]]) -> tuple[Answer | None, LineError | None]:
    """Whatever went wrong, the line gets a cause: a defect of ours must not end its batch."""
    try:
        return question.result()
    except Exception as error:  # noqa: BLE001 - see above
        problem = repr(error)
    log("line_failed", level="error", reason=problem)
    return None, LineError("internal_error", problem)
