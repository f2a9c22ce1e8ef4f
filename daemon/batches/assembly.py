"""Writes a batch's output and error file from its stored results: every custom_id once, in the order of the input."""

from __future__ import annotations

import msgspec

from pointsman.daemon.batches import output_lines
from pointsman.daemon.batches.files import FileWriter
from pointsman.daemon.batches.lifecycle import Status
from pointsman.daemon.batches.payloads import Payloads
from pointsman.daemon.batches.recorder import result_key
from pointsman.daemon.batches.rows import BatchRow, LineRow, LineState
from pointsman.daemon.batches.shelf import Shelf

PAGE = 64
"""results in memory at once; each is as large as an answer may be"""
MAX_LOSSES = 2
"""times that a line is run again because its result was lost; then it is reported as an error"""


class Assembled(msgspec.Struct, frozen=True):
    output_file: str | None
    error_file: str | None
    unrun: int
    """lines that never were run: each has its line in the error file"""
    given_up: list[int]
    """lines whose result is lost for good; reported as such in the error file"""


class ResultsLost(msgspec.Struct, frozen=True):
    """These finished lines have to be run again before the files can be written."""

    numbers: list[int]


class Assembly:
    def __init__(self, shelf: Shelf, files: Payloads, results: Payloads, batch: BatchRow) -> None:
        self._shelf = shelf
        self._results = results
        self._batch = batch
        self._output = FileWriter(shelf, files)
        self._errors = FileWriter(shelf, files)
        self._unrun = 0
        self._lost: list[int] = []
        self._given_up: list[int] = []

    async def run(self) -> Assembled | ResultsLost:
        """Raises StoreTrouble; whatever was written until then is dropped by `drop`."""
        batch = self._batch
        for writer, kind in ((self._output, "output"), (self._errors, "error")):
            await writer.begin(batch.owner, f"{batch.id}_{kind}.jsonl", "batch_output")
        last = 0
        while page := await self._shelf.do(self._shelf.ledger.lines, batch.serial, last, PAGE):
            await self._write(page)
            last = page[-1].number
        if self._lost:
            return ResultsLost(self._lost)
        return Assembled(await self._close(self._output), await self._close(self._errors), self._unrun, self._given_up)

    async def drop(self) -> None:
        for writer in (self._output, self._errors):
            await writer.drop()

    async def _write(self, page: list[LineRow]) -> None:
        done = [line for line in page if line.state is not LineState.PENDING]
        found = await self._results.find([result_key(self._batch.id, line.number) for line in done])
        results = {line.number: result for line, result in zip(done, found, strict=True)}
        for line in page:
            result = results.get(line.number)
            if result is not None:
                await (self._output if line.state is LineState.SUCCEEDED else self._errors).write(result)
            elif line.state is LineState.PENDING:
                self._unrun += 1
                await self._report(line, self._why_unrun())
            elif self._may_run_again(line):
                self._lost.append(line.number)
            else:
                self._given_up.append(line.number)
                await self._report(line, output_lines.LOST)

    def _may_run_again(self, line: LineRow) -> bool:
        has_time = self._batch.status is Status.FINALIZING and not self._batch.is_expired
        return has_time and line.losses < MAX_LOSSES

    def _why_unrun(self) -> output_lines.LineError:
        return output_lines.CANCELLED if self._batch.status is Status.CANCELLING else output_lines.EXPIRED

    async def _report(self, line: LineRow, error: output_lines.LineError) -> None:
        await self._errors.write(output_lines.render(self._batch.id, line.number, line.custom_id, None, error))

    async def _close(self, writer: FileWriter) -> str | None:
        """Its id; None for a file without lines, which is dropped."""
        if not writer.size_bytes:
            await writer.drop()
            return None
        await writer.flush()
        return writer.id
