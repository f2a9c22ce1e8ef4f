"""Values in one SQLite file: the default. Survives a restart, needs nothing but the standard library.

One transaction a batch. Two connections, one that writes and one that reads, each used by one thread at a time: WAL
lets them work side by side, and more writers would only wait for each other. What is stored is counted in the same
transaction that stores it (`usage`), so the count is right after a crash and for every process with the file open.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from pointsman.daemon.stores.codes import CodeTable
from pointsman.daemon.stores.framing import Buffer, Frame
from pointsman.daemon.stores.problems import StoreUnusableError
from pointsman.daemon.stores.results import MISSING, OK_NONE, Failure, Ok, Stat, Written

R = TypeVar("R")

CODES = CodeTable(
    no_space=frozenset({"SQLITE_FULL", "quota"}),
    invalid=frozenset(
        {
            "SQLITE_TOOBIG",
            "SQLITE_READONLY",
            "SQLITE_READONLY_DBMOVED",
            "SQLITE_READONLY_DIRECTORY",
            "SQLITE_PERM",
            "SQLITE_CANTOPEN",
            "SQLITE_MISMATCH",
            "SQLITE_ERROR",
            "closed",
        }
    ),
    corrupt=frozenset({"SQLITE_CORRUPT", "SQLITE_NOTADB"}),
)

MAX_VALUE_BYTES = 900 * 1024 * 1024
"""SQLite's own limit is 1e9 bytes for a whole row"""
EXPIRE_BATCH = 400
_FORMAT = 1
_BUSY_SHARE_MS = 1000
_PAGE_BYTES = 16 * 1024
"""several values of 4 KB a page: a quarter faster than with pages that each of them overflows"""
_VACUUM_PAGES = 1024

Synchronous = Literal["normal", "full"]

_SCHEMA = """
CREATE TABLE blobs (
    key TEXT NOT NULL UNIQUE,
    expires_at REAL, -- seconds since 1970; NULL = never
    frame BLOB NOT NULL
);
CREATE INDEX blobs_by_expiry ON blobs (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE usage (keys INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO usage VALUES (0, 0);
"""
_UPSERT = """
INSERT INTO blobs (key, expires_at, frame) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET expires_at = excluded.expires_at, frame = excluded.frame
"""


class Usage(msgspec.Struct, frozen=True):
    keys: int
    size_bytes: int
    """of the frames; the file is larger, and does not shrink by itself when values go"""


class SqliteBackend:
    """`max_bytes` bounds the sum of the frames (0 = only the disk does): a batch beyond it is NoSpace("quota").

    Raises StoreUnusableError when the file cannot be opened or is something else.
    """

    name = "sqlite"
    codes = CODES
    threads = 1
    max_value_bytes = MAX_VALUE_BYTES
    is_volatile = False

    def __init__(
        self,
        path: Path,
        *,
        synchronous: Synchronous = "full",
        max_bytes: int = 0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._wall_clock = wall_clock
        try:
            self._writer = _Connection(path, synchronous)
            self._writer.prepare()
            self._reader = _Connection(path, synchronous)
        except sqlite3.Error as error:
            raise StoreUnusableError(f"{path} cannot be used as a store: {error} ({_code(error)})") from error

    def put_batch(
        self, keys: Sequence[str], frames: Sequence[Frame], ttl_s: float | None, timeout_s: float
    ) -> list[Ok[Written] | Failure]:
        expires_at = None if ttl_s is None else self._wall_clock() + ttl_s
        rows = [(key, expires_at, frame.join()) for key, frame in zip(keys, frames, strict=True)]
        added = sum(frame.size_bytes for frame in frames)

        def put(db: sqlite3.Connection) -> list[Ok[Written] | Failure]:
            replaced_keys, replaced_bytes = _measure(db, keys)
            (used,) = db.execute("SELECT bytes FROM usage").fetchone()
            if self.max_bytes and used + added - replaced_bytes > self.max_bytes:
                return [CODES.judge("quota")] * len(keys)
            db.executemany(_UPSERT, rows)
            _account(db, len(keys) - replaced_keys, added - replaced_bytes)
            return [_WRITTEN] * len(keys)

        return self._attempt(self._writer, keys, timeout_s, put)

    def get_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Buffer] | Failure]:
        def get(db: sqlite3.Connection) -> list[Ok[Buffer] | Failure]:
            query = f"SELECT key, frame FROM blobs WHERE key IN ({_marks(keys)}) AND {_IS_ALIVE}"  # noqa: S608 - marks
            found: dict[str, bytes] = dict(db.execute(query, (*keys, self._wall_clock())).fetchall())
            return [Ok(found[key]) if key in found else MISSING for key in keys]

        return self._attempt(self._reader, keys, timeout_s, get)

    def delete_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[None] | Failure]:
        def delete(db: sqlite3.Connection) -> list[Ok[None] | Failure]:
            gone_keys, gone_bytes = _measure(db, keys)
            query = f"DELETE FROM blobs WHERE key IN ({_marks(keys)}) RETURNING key, expires_at"  # noqa: S608 - marks
            now = self._wall_clock()
            gone = {key for key, expires_at in db.execute(query, keys) if expires_at is None or expires_at > now}
            _account(db, -gone_keys, -gone_bytes)
            return [OK_NONE if key in gone else MISSING for key in keys]

        return self._attempt(self._writer, keys, timeout_s, delete)

    def stat_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Stat] | Failure]:
        def stat(db: sqlite3.Connection) -> list[Ok[Stat] | Failure]:
            columns = "key, length(frame), expires_at"
            query = f"SELECT {columns} FROM blobs WHERE key IN ({_marks(keys)}) AND {_IS_ALIVE}"  # noqa: S608 - marks
            now = self._wall_clock()
            found = {
                key: Stat(size, ttl_s=None if expires_at is None else expires_at - now)
                for key, size, expires_at in db.execute(query, (*keys, now))
            }
            return [Ok(found[key]) if key in found else MISSING for key in keys]

        return self._attempt(self._reader, keys, timeout_s, stat)

    def usage(self) -> Usage:
        """Includes what has expired and was not yet removed. Raises sqlite3.Error."""
        with self._reader.use(_BUSY_SHARE_MS / 1000) as db:
            return Usage(*db.execute("SELECT keys, bytes FROM usage").fetchone())

    def tidy(self) -> None:
        """In small steps: whoever wants to write comes in between."""
        with suppress(sqlite3.Error):
            while self.remove_expired() == EXPIRE_BATCH:
                pass
            while self._give_back():
                pass

    def remove_expired(self) -> int:
        """Up to EXPIRE_BATCH values whose time is over; returns how many. Raises sqlite3.Error."""
        with self._writer.use(_BUSY_SHARE_MS / 1000) as db, _transaction(db):
            query = "SELECT rowid, length(frame) FROM blobs WHERE expires_at <= ? LIMIT ?"
            rows = db.execute(query, (self._wall_clock(), EXPIRE_BATCH)).fetchall()
            db.executemany("DELETE FROM blobs WHERE rowid = ?", [(row,) for row, _ in rows])
            _account(db, -len(rows), -sum(size for _, size in rows))
            return len(rows)

    def _give_back(self) -> bool:
        """Some of the free pages to the disk; whether there are more. Raises sqlite3.Error."""
        with self._writer.use(_BUSY_SHARE_MS / 1000) as db:
            # This statement frees a page a step, and `execute` makes only the first one.
            db.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
            (left,) = db.execute("PRAGMA freelist_count").fetchone()
            return bool(left)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _attempt(
        self,
        connection: _Connection,
        keys: Sequence[str],
        timeout_s: float,
        work: Callable[[sqlite3.Connection], list[Ok[R] | Failure]],
    ) -> list[Ok[R] | Failure]:
        """All of the batch or, with the same failure for every key, nothing of it."""
        try:
            with connection.use(timeout_s) as db:
                if connection is self._reader:
                    return work(db)
                with _transaction(db):
                    return work(db)
        except sqlite3.Error as error:
            return [CODES.judge(_code(error))] * len(keys)


_WRITTEN: Ok[Written] = Ok(Written())
_IS_ALIVE = "(expires_at IS NULL OR expires_at > ?)"


class _Connection:
    """One connection for all threads, one at a time."""

    def __init__(self, path: Path, synchronous: Synchronous) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            # Both only have an effect before the first page is written, which the switch to WAL does.
            self._db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {synchronous.upper()}")
        except sqlite3.Error:
            self._db.close()
            raise

    def prepare(self) -> None:
        """Makes the tables of a new file. Raises StoreUnusableError when it is of another kind or a later format."""
        with _transaction(self._db):
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if found == _FORMAT:
                return
            if found or tables:
                raise StoreUnusableError(f"the database is no store of this version (format {found}, {tables} tables)")
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_FORMAT}")

    @contextmanager
    def use(self, timeout_s: float) -> Iterator[sqlite3.Connection]:
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            raise _busy()
        try:
            self._db.execute(f"PRAGMA busy_timeout = {min(_BUSY_SHARE_MS, max(1, int(timeout_s * 1000)))}")
            yield self._db
        finally:
            self._lock.release()

    def close(self) -> None:
        with self._lock:
            self._db.close()


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors, a full disk among them, have ended it already
            db.execute("ROLLBACK")
        raise


def _measure(db: sqlite3.Connection, keys: Sequence[str]) -> tuple[int, int]:
    """How many of these keys exist, and the bytes of their frames. length() of a BLOB does not read the BLOB."""
    query = f"SELECT count(*), coalesce(sum(length(frame)), 0) FROM blobs WHERE key IN ({_marks(keys)})"  # noqa: S608
    count, size = db.execute(query, keys).fetchone()
    return count, size


def _account(db: sqlite3.Connection, keys: int, size_bytes: int) -> None:
    db.execute("UPDATE usage SET keys = keys + ?, bytes = bytes + ?", (keys, size_bytes))


def _marks(keys: Sequence[str]) -> str:
    return ",".join("?" * len(keys))


def _busy() -> sqlite3.Error:
    error = sqlite3.OperationalError("another thread uses the connection")
    error.sqlite_errorname = "SQLITE_BUSY"
    return error


def _code(error: sqlite3.Error) -> str:
    name: str | None = getattr(error, "sqlite_errorname", None)
    if name:
        return name
    return "closed" if isinstance(error, sqlite3.ProgrammingError) else "SQLITE_ERROR"
