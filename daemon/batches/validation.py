"""Reads a batch's input once, line by line: all of its lines into the ledger, or a list of what is wrong with them."""

from __future__ import annotations

from typing import Any

import msgspec

from pointsman.daemon.batches.files import FileReader, lines_of
from pointsman.daemon.batches.input_lines import LineProblem, read_line
from pointsman.daemon.batches.ledger import DuplicateCustomIdError
from pointsman.daemon.batches.payloads import PayloadLost
from pointsman.daemon.batches.rows import BatchRow, FileRow, NewLine
from pointsman.daemon.batches.shelf import Shelf

MAX_PROBLEMS = 20
"""that are reported; nobody mends more at once"""
_PAGE = 1000


class Limits(msgspec.Struct, frozen=True):
    lines: int
    line_bytes: int


class Validation:
    """One pass over one input file."""

    def __init__(self, shelf: Shelf, batch: BatchRow, limits: Limits) -> None:
        self._shelf = shelf
        self._batch = batch
        self._limits = limits
        self._page: list[NewLine] = []
        self.total = 0
        self.problems: list[LineProblem] = []
        self._is_hopeless = False

    async def run(self, file: FileRow, reader: FileReader) -> None:
        """Raises StoreTrouble. Without problems afterwards, all lines are in the ledger."""
        await self._shelf.do(self._shelf.ledger.begin_lines, self._batch.serial)
        try:
            async for number, place, raw in lines_of(reader.stream(file), self._limits.line_bytes):
                await self._take(number, place, raw)
                if self._is_hopeless or len(self.problems) >= MAX_PROBLEMS:
                    return
        except PayloadLost as error:
            self.problems = [LineProblem(0, "input_lost", str(error), "input_file_id")]
            return
        await self._save()
        if not self.total and not self.problems:
            self.problems.append(LineProblem(0, "empty_file", "the input file has no lines", "input_file_id"))

    def input_missing(self) -> None:
        self.problems.append(LineProblem(0, "input_missing", "the input file is gone", "input_file_id"))

    async def _take(self, number: int, place: int, raw: bytes | None) -> None:
        if raw is not None and not raw.strip():
            return  # an empty line is nobody's request
        try:
            if raw is None:
                most = self._limits.line_bytes
                raise LineProblem(number, "line_too_long", f"the line has more than {most} bytes")
            line = read_line(raw, number, self._batch.endpoint)
        except LineProblem as problem:
            self.problems.append(problem)
            return
        self.total += 1
        if self.total > self._limits.lines:
            message = f"more than {self._limits.lines} requests in one batch"
            self.problems.append(LineProblem(number, "too_many_requests", message))
            self._is_hopeless = True
            return
        self._page.append(NewLine(number, line.custom_id, place, len(raw), line.group))
        if len(self._page) >= _PAGE:
            await self._save()

    async def _save(self) -> None:
        page, self._page = self._page, []
        try:
            await self._shelf.do(self._shelf.ledger.add_lines, self._batch.serial, page)
        except DuplicateCustomIdError as error:
            message = f"{error}: {error.custom_id[:80]!r}"
            self.problems.append(LineProblem(error.number, "duplicate_custom_id", message, "custom_id"))

    def errors(self) -> list[dict[str, Any]]:
        """In OpenAI's shape, in the order of the lines."""
        ordered = sorted(self.problems, key=lambda problem: problem.line)
        return [{"code": p.code, "message": p.message, "param": p.param, "line": p.line or None} for p in ordered]
