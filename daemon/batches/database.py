"""The SQLite file of the ledger: WAL, every commit on disk before it returns, one process at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pointsman.daemon.errors import PointsmanError

_FORMAT = 1
_SCHEMA = """
CREATE TABLE files (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, -- in the order of their making: what lists go by
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL, -- writing, ready, deleting
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    chunks INTEGER NOT NULL, -- keys of the store that may exist: counted before they are written
    created_at INTEGER NOT NULL, -- all times: whole seconds since 1970
    expires_at INTEGER
);
CREATE INDEX files_by_owner ON files (owner, serial);
CREATE INDEX files_by_state ON files (state, expires_at);
CREATE TABLE batches (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    is_expired INTEGER NOT NULL DEFAULT 0,
    input_file TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT, -- JSON
    errors TEXT, -- JSON
    output_ttl_s INTEGER,
    output_file TEXT,
    error_file TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0, -- results that the store had and lost
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
);
CREATE INDEX batches_by_owner ON batches (owner, serial);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE lines ( -- of batches that run; removed when their files are written
    batch INTEGER NOT NULL, -- batches.serial
    number INTEGER NOT NULL, -- in the input file, from 1
    custom_id TEXT NOT NULL,
    place INTEGER NOT NULL, -- of the first byte in the input file
    size INTEGER NOT NULL,
    grouped BLOB NOT NULL,
    state INTEGER NOT NULL, -- see ledger.LineState
    losses INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, number)
) WITHOUT ROWID;
CREATE UNIQUE INDEX lines_by_custom_id ON lines (batch, custom_id);
CREATE INDEX lines_to_run ON lines (batch, state, grouped, number)
"""


class LedgerUnusableError(PointsmanError):
    """The file is of another kind or of a later version."""


def open_database(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error, LedgerUnusableError. Autocommit: use `transaction` for more than one statement.

    With exclusive locking there is no shared-memory file beside it, which a full disk could break under our feet.
    """
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        _prepare(db, path)
    except (sqlite3.Error, LedgerUnusableError):
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    with transaction(db):
        (found,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if found == _FORMAT:
            return
        if found or tables:
            raise LedgerUnusableError(f"{path} is no ledger of this version (format {found}, {tables} tables)")
        for statement in _SCHEMA.split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {_FORMAT}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors, a full disk among them, have ended it already
            db.execute("ROLLBACK")
        raise
