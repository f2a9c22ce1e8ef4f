"""What is known of files, batches and lines, on disk: the one truth of this process. Blocking; one thread at a time.

Every method is one transaction: after a crash it has happened or it has not. Times are whole seconds since 1970 and
come from the caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from pointsman.daemon.batches.database import open_database, transaction
from pointsman.daemon.batches.lifecycle import FINAL, RUNNING, Event, Status, next_status
from pointsman.daemon.batches.rows import BatchRow, DoneLine, FileRow, LineRow, LineState, NewBatch, NewLine, Page
from pointsman.daemon.errors import PointsmanError

_FILE = ", ".join(FileRow.__struct_fields__)
_BATCH = ", ".join(BatchRow.__struct_fields__)
_LINE = ", ".join(LineRow.__struct_fields__)
_STAMPS = {
    Status.IN_PROGRESS: "in_progress_at",
    Status.FINALIZING: "finalizing_at",
    Status.COMPLETED: "completed_at",
    Status.FAILED: "failed_at",
    Status.EXPIRED: "expired_at",
    Status.CANCELLING: "cancelling_at",
    Status.CANCELLED: "cancelled_at",
}


class DuplicateCustomIdError(PointsmanError):
    def __init__(self, number: int, first: int, custom_id: str) -> None:
        self.number, self.first, self.custom_id = number, first, custom_id
        super().__init__(f"line {number} has the custom_id of line {first}")


class FileInUseError(PointsmanError):
    def __init__(self, batch_id: str) -> None:
        self.batch_id = batch_id
        super().__init__(f"the batch {batch_id} still needs the file")


class QuotaError(PointsmanError):
    """Its owner has `used` already: bytes of files, or running batches."""

    def __init__(self, used: int) -> None:
        self.used = used
        super().__init__(f"{used} are used")


class Ledger:
    def __init__(self, path: Path) -> None:
        """Raises as `open_database`."""
        self._db = open_database(path)

    def close(self) -> None:
        self._db.close()

    # --- files

    def begin_file(self, id: str, owner: str, filename: str, purpose: str, now: int) -> None:
        """A file that is being written: nobody sees it, and a start without `finish_file` before it removes it."""
        self._db.execute(
            "INSERT INTO files (id, owner, state, filename, purpose, bytes, chunks, created_at)"
            " VALUES (?, ?, 'writing', ?, ?, 0, 0, ?)",
            (id, owner, filename, purpose, now),
        )

    def extend_file(self, id: str, chunks: int, size_bytes: int) -> None:
        """Before these chunks are written."""
        self._db.execute("UPDATE files SET chunks = ?, bytes = ? WHERE id = ?", (chunks, size_bytes, id))

    def finish_file(self, id: str, purpose: str, filename: str, expires_at: int | None, most_bytes: int = 0) -> FileRow:
        """`most_bytes`: of all finished files of its owner, this one included; 0 = any. Raises QuotaError."""
        with transaction(self._db):
            self._db.execute(
                "UPDATE files SET state = 'ready', purpose = ?, filename = ?, expires_at = ? WHERE id = ?",
                (purpose, filename, expires_at, id),
            )
            file = cast("FileRow", self._file_by_id(id))
            query = "SELECT sum(bytes) FROM files WHERE owner = ? AND state = 'ready'"
            (used,) = self._db.execute(query, (file.owner,)).fetchone()
            if most_bytes and used > most_bytes:
                raise QuotaError(used)
            return file

    def file(self, id: str, owner: str | None) -> FileRow | None:
        """`owner` None: whoever's."""
        row = self._file_by_id(id)
        return row if row is not None and owner in (None, row.owner) else None

    def files(self, owner: str, page: Page, purpose: str | None = None) -> tuple[list[FileRow], bool]:
        """(a page, whether more follow)."""
        only = " AND state = 'ready'" + (" AND purpose = ?" if purpose else "")
        rows, has_more = self._page("files", _FILE, owner, page, only, (purpose,) if purpose else ())
        return [FileRow(*row) for row in rows], has_more

    def used_bytes(self, owner: str) -> int:
        query = "SELECT coalesce(sum(bytes), 0) FROM files WHERE owner = ? AND state != 'deleting'"
        (size,) = self._db.execute(query, (owner,)).fetchone()
        return int(size)

    def drop_file(self, id: str) -> None:
        """Nobody sees it any more; its chunks are to be deleted. Raises FileInUseError."""
        with transaction(self._db):
            marks = ",".join("?" * len(RUNNING))
            query = f"SELECT id FROM batches WHERE input_file = ? AND status IN ({marks})"  # noqa: S608 - marks
            user = self._db.execute(query, (id, *RUNNING)).fetchone()
            if user is not None:
                raise FileInUseError(user[0])
            self._db.execute("UPDATE files SET state = 'deleting' WHERE id = ?", (id,))

    def drop_unfinished_files(self) -> None:
        """At a start: whoever was writing them is gone."""
        self._db.execute("UPDATE files SET state = 'deleting' WHERE state = 'writing'")

    def drop_expired_files(self, now: int) -> int:
        """Returns how many; those that a running batch needs stay."""
        marks = ",".join("?" * len(RUNNING))
        cursor = self._db.execute(
            "UPDATE files SET state = 'deleting' WHERE state = 'ready' AND expires_at <= ?"  # noqa: S608 - marks
            f" AND id NOT IN (SELECT input_file FROM batches WHERE status IN ({marks}))",
            (now, *RUNNING),
        )
        return cursor.rowcount

    def dropped_files(self, limit: int) -> list[FileRow]:
        query = f"SELECT {_FILE} FROM files WHERE state = 'deleting' ORDER BY serial LIMIT ?"  # noqa: S608 - columns
        return [FileRow(*row) for row in self._db.execute(query, (limit,))]

    def forget_file(self, id: str) -> None:
        """All of its chunks are deleted."""
        self._db.execute("DELETE FROM files WHERE id = ? AND state = 'deleting'", (id,))

    def tidy(self) -> None:
        """Gives space that lines and files do not need any more back to the disk."""
        self._db.executescript("PRAGMA incremental_vacuum")

    # --- batches

    def add_batch(self, new: NewBatch, now: int, most_running: int = 0) -> BatchRow:
        """`most_running`: of its owner, this one included; 0 = any number. Raises QuotaError."""
        with transaction(self._db):
            running = len(self.running_batches(new.owner))
            if most_running and running >= most_running:
                raise QuotaError(running)
            self._db.execute(
                "INSERT INTO batches (id, owner, status, input_file, endpoint, completion_window, metadata,"
                " output_ttl_s, created_at, expires_at) VALUES (?, ?, 'validating', ?, ?, ?, ?, ?, ?, ?)",
                (
                    new.id,
                    new.owner,
                    new.input_file,
                    new.endpoint,
                    new.completion_window,
                    _json(new.metadata),
                    new.output_ttl_s,
                    now,
                    now + new.window_s,
                ),
            )
            return cast("BatchRow", self._batch_by_id(new.id))

    def batch(self, id: str, owner: str | None = None) -> BatchRow | None:
        """`owner` None: whoever's."""
        row = self._batch_by_id(id)
        return row if row is not None and owner in (None, row.owner) else None

    def batches(self, owner: str | None, page: Page) -> tuple[list[BatchRow], bool]:
        """(a page, whether more follow). `owner` None: everybody's."""
        rows, has_more = self._page("batches", _BATCH, owner, page)
        return [_batch(row) for row in rows], has_more

    def running_batches(self, owner: str | None = None) -> list[BatchRow]:
        """Those with work left, oldest first."""
        marks = ",".join("?" * len(RUNNING))
        query = f"SELECT {_BATCH} FROM batches WHERE status IN ({marks}) ORDER BY serial"  # noqa: S608 - columns, marks
        found = [_batch(row) for row in self._db.execute(query, tuple(RUNNING))]
        return [batch for batch in found if owner in (None, batch.owner)]

    def advance(self, id: str, event: Event, now: int) -> BatchRow:
        """Raises NotPossible."""
        with transaction(self._db):
            return self._advance(id, event, now)

    def reject(self, id: str, errors: Sequence[dict[str, Any]], now: int) -> BatchRow:
        """What validation has found."""
        with transaction(self._db):
            batch = self._advance(id, Event.INVALID, now)
            self._db.execute("UPDATE batches SET errors = ? WHERE id = ?", (_json(list(errors)), id))
            self._db.execute("DELETE FROM lines WHERE batch = ?", (batch.serial,))
            return cast("BatchRow", self._batch_by_id(id))

    def complete(self, id: str, output_file: str | None, error_file: str | None, unrun: int, now: int) -> BatchRow:
        """The files become visible and the batch final at the same moment. `unrun`: lines that never were run."""
        with transaction(self._db):
            batch = self._advance(id, Event.WRITTEN, now)
            expires_at = None if batch.output_ttl_s is None else now + batch.output_ttl_s
            for file in (output_file, error_file):
                if file is not None:
                    query = "UPDATE files SET state = 'ready', expires_at = ? WHERE id = ?"
                    self._db.execute(query, (expires_at, file))
            self._db.execute(
                "UPDATE batches SET output_file = ?, error_file = ?, failed = failed + ? WHERE id = ?",
                (output_file, error_file, unrun, id),
            )
            return cast("BatchRow", self._batch_by_id(id))

    def finished_with_lines(self) -> list[BatchRow]:
        """Final batches whose results are still in the store."""
        marks = ",".join("?" * len(FINAL))
        query = (
            f"SELECT {_BATCH} FROM batches WHERE status IN ({marks})"  # noqa: S608 - columns, marks
            " AND EXISTS (SELECT 1 FROM lines WHERE lines.batch = batches.serial)"
        )
        return [_batch(row) for row in self._db.execute(query, tuple(FINAL))]

    def forget_batches(self, before: int) -> int:
        """Final ones that were made before `before` and have no lines any more; returns how many."""
        marks = ",".join("?" * len(FINAL))
        cursor = self._db.execute(
            f"DELETE FROM batches WHERE status IN ({marks}) AND created_at < ?"  # noqa: S608 - marks
            " AND NOT EXISTS (SELECT 1 FROM lines WHERE lines.batch = batches.serial)",
            (*FINAL, before),
        )
        return cursor.rowcount

    # --- lines

    def begin_lines(self, batch: int) -> None:
        """Validation starts, perhaps again."""
        self._db.execute("DELETE FROM lines WHERE batch = ?", (batch,))

    def add_lines(self, batch: int, lines: Sequence[NewLine]) -> None:
        """All of them or none. Raises DuplicateCustomIdError."""
        query = "INSERT INTO lines (batch, number, custom_id, place, size, grouped, state) VALUES (?, ?, ?, ?, ?, ?, 0)"
        line: NewLine | None = None
        with transaction(self._db):
            try:
                for line in lines:
                    self._db.execute(query, (batch, line.number, line.custom_id, line.place, line.size, line.grouped))
            except sqlite3.IntegrityError:
                assert line is not None
                query = "SELECT number FROM lines WHERE batch = ? AND custom_id = ?"
                (first,) = self._db.execute(query, (batch, line.custom_id)).fetchone()
                raise DuplicateCustomIdError(line.number, first, line.custom_id) from None

    def start(self, id: str, total: int, now: int) -> BatchRow:
        """All lines are there and valid."""
        with transaction(self._db):
            self._db.execute("UPDATE batches SET total = ? WHERE id = ?", (total, id))
            return self._advance(id, Event.VALID, now)

    def pending(self, batch: int, after: LineRow | None, limit: int) -> list[LineRow]:
        """Lines to run, in the order of their groups."""
        grouped, number = (after.grouped, after.number) if after else (b"", 0)
        query = (
            f"SELECT {_LINE} FROM lines WHERE batch = ? AND state = 0 AND (grouped, number) > (?, ?)"  # noqa: S608
            " ORDER BY grouped, number LIMIT ?"
        )
        return [_line(row) for row in self._db.execute(query, (batch, grouped, number, limit))]

    def lines(self, batch: int, after: int, limit: int) -> list[LineRow]:
        """In the order of the input, after line number `after`."""
        query = f"SELECT {_LINE} FROM lines WHERE batch = ? AND number > ? ORDER BY number LIMIT ?"  # noqa: S608 - columns
        return [_line(row) for row in self._db.execute(query, (batch, after, limit))]

    def mark_done(self, lines: Iterable[DoneLine]) -> None:
        """Their results are in the store. Says nothing new of a line that is done already."""
        with transaction(self._db):
            for line in lines:
                state = LineState.SUCCEEDED if line.has_succeeded else LineState.FAILED
                query = "UPDATE lines SET state = ? WHERE batch = ? AND number = ? AND state = 0"
                if self._db.execute(query, (state, line.batch, line.number)).rowcount:
                    column = "completed" if line.has_succeeded else "failed"
                    query = f"UPDATE batches SET {column} = {column} + 1 WHERE serial = ?"  # noqa: S608 - column
                    self._db.execute(query, (line.batch,))

    def run_again(self, id: str, numbers: Sequence[int], now: int) -> BatchRow:
        """The store has lost what these finished lines were answered. Raises NotPossible when there is no time."""
        with transaction(self._db):
            batch = self._advance(id, Event.RESULTS_LOST, now)
            for number in numbers:
                query = "SELECT state FROM lines WHERE batch = ? AND number = ?"
                (state,) = self._db.execute(query, (batch.serial, number)).fetchone()
                column = "completed" if state == LineState.SUCCEEDED else "failed"
                query = f"UPDATE batches SET {column} = {column} - 1, lost = lost + 1 WHERE serial = ?"  # noqa: S608
                self._db.execute(query, (batch.serial,))
                query = "UPDATE lines SET state = 0, losses = losses + 1 WHERE batch = ? AND number = ?"
                self._db.execute(query, (batch.serial, number))
            return cast("BatchRow", self._batch_by_id(id))

    def give_up_results(self, id: str, numbers: Sequence[int]) -> None:
        """These lines' results are lost for good: what counted as completed has failed."""
        with transaction(self._db):
            batch = cast("BatchRow", self._batch_by_id(id))
            for number in numbers:
                query = "UPDATE lines SET state = 2 WHERE batch = ? AND number = ? AND state = 1"
                changed = self._db.execute(query, (batch.serial, number)).rowcount
                moved = "completed = completed - ?1, failed = failed + ?1, lost = lost + 1"
                query = f"UPDATE batches SET {moved} WHERE serial = ?2"  # noqa: S608 - columns
                self._db.execute(query, (changed, batch.serial))

    def forget_lines(self, batch: int, up_to: int) -> None:
        """Those with numbers up to this one: their results are deleted."""
        self._db.execute("DELETE FROM lines WHERE batch = ? AND number <= ?", (batch, up_to))

    def first_lines(self, batch: int, limit: int) -> list[int]:
        """Their numbers."""
        query = "SELECT number FROM lines WHERE batch = ? ORDER BY number LIMIT ?"
        return [number for (number,) in self._db.execute(query, (batch, limit))]

    # --- the rows

    def _advance(self, id: str, event: Event, now: int) -> BatchRow:
        batch = cast("BatchRow", self._batch_by_id(id))
        status = next_status(batch.status, event, is_expired=batch.is_expired)
        if status is not batch.status:
            stamp = _STAMPS[status]
            query = f"UPDATE batches SET status = ?, {stamp} = coalesce({stamp}, ?) WHERE id = ?"  # noqa: S608 - column
            self._db.execute(query, (status, now, id))
        if event is Event.WINDOW_OVER and status is Status.FINALIZING:
            self._db.execute("UPDATE batches SET is_expired = 1 WHERE id = ?", (id,))
        return cast("BatchRow", self._batch_by_id(id))

    def _file_by_id(self, id: str) -> FileRow | None:
        query = f"SELECT {_FILE} FROM files WHERE id = ? AND state = 'ready'"  # noqa: S608 - columns
        row = self._db.execute(query, (id,)).fetchone()
        return None if row is None else FileRow(*row)

    def _batch_by_id(self, id: str) -> BatchRow | None:
        row = self._db.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (id,)).fetchone()  # noqa: S608 - columns
        return None if row is None else _batch(row)

    def _page(
        self, table: str, columns: str, owner: str | None, page: Page, only: str = "", values: tuple[Any, ...] = ()
    ) -> tuple[list[Any], bool]:
        where, order = "1 = 1" if owner is None else "owner = ?", "ASC" if page.is_ascending else "DESC"
        parameters: list[Any] = [] if owner is None else [owner]
        where += only
        parameters += values
        if page.after is not None:
            where += f" AND serial {'>' if page.is_ascending else '<'} (SELECT serial FROM {table} WHERE id = ?)"  # noqa: S608
            parameters.append(page.after)
        query = f"SELECT {columns} FROM {table} WHERE {where} ORDER BY serial {order} LIMIT ?"  # noqa: S608 - all ours
        rows = self._db.execute(query, (*parameters, page.limit + 1)).fetchall()
        return rows[: page.limit], len(rows) > page.limit


def _batch(row: tuple[Any, ...]) -> BatchRow:
    fields = dict(zip(BatchRow.__struct_fields__, row, strict=True))
    fields["status"] = Status(fields["status"])
    fields["is_expired"] = bool(fields["is_expired"])
    for name in ("metadata", "errors"):
        fields[name] = None if fields[name] is None else msgspec.json.decode(fields[name])
    return BatchRow(**fields)


def _line(row: tuple[Any, ...]) -> LineRow:
    number, custom_id, place, size, grouped, state, losses = row
    return LineRow(number, custom_id, place, size, grouped, LineState(state), losses)


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
