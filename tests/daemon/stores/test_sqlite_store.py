from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pointsman.daemon.stores.framing import encode
from pointsman.daemon.stores.problems import StoreUnusableError
from pointsman.daemon.stores.results import MISSING, Corrupt, Invalid, NoSpace, Ok, Stat, Transient, require_all
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from pointsman.daemon.stores.sqlite_store import SqliteBackend, Usage


class Wall:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blobs.db"


def test_values_outlive_the_process_that_wrote_them(path: Path) -> None:
    with closing(RetransmittingStore(SqliteBackend(path))) as store:
        require_all("put", ["a"], store.put_many(["a"], [b"x"]))
    with closing(RetransmittingStore(SqliteBackend(path))) as store:
        assert store.get_many(["a"]) == [Ok(b"x")]


def test_time_to_live(path: Path) -> None:
    wall = Wall()
    with closing(SqliteBackend(path, wall_clock=wall)) as backend, closing(RetransmittingStore(backend)) as store:
        store.put_many(["a", "b"], [b"x", b"y"], ttl_s=60)
        store.put_many(["c"], [b"z"])
        store.put_many(["b"], [b"y"], ttl_s=600)
        assert store.stat_many(["a", "c"]) == [Ok(Stat(21, ttl_s=60.0)), Ok(Stat(21))]
        wall.now += 61
        assert store.get_many(["a", "b", "c"]) == [MISSING, Ok(b"y"), Ok(b"z")]
        assert store.stat_many(["a"]) == [MISSING]
        assert backend.usage().keys == 3
        assert backend.remove_expired() == 1
        assert backend.remove_expired() == 0
        assert backend.usage() == Usage(2, 42)
        wall.now += 3600
        assert store.delete_many(["b", "c"]) == [MISSING, Ok(None)]
        assert backend.usage() == Usage(0, 0)


def test_usage_counts_overwriting_and_deleting(path: Path) -> None:
    with closing(SqliteBackend(path)) as backend, closing(RetransmittingStore(backend)) as store:
        store.put_many(["a", "b"], [bytes(80), bytes(180)])
        assert backend.usage() == Usage(2, 300)
        store.put_many(["a", "c"], [b"", bytes(80)])
        assert backend.usage() == Usage(3, 320)
        store.delete_many(["b", "nothing"])
        assert backend.usage() == Usage(2, 120)


def test_space_goes_back_to_the_disk(path: Path) -> None:
    wall = Wall()
    with closing(SqliteBackend(path, wall_clock=wall)) as backend, closing(RetransmittingStore(backend)) as store:
        store.put_many([str(number) for number in range(100)], [bytes(100_000)] * 100, ttl_s=1)
        wall.now += 2
        assert store.get_many(["1"]) == [MISSING]
        store.put_many(["kept"], [b"x"])
        store.tidy()
        assert backend.usage().keys == 1
        assert store.get_many(["kept"]) == [Ok(b"x")]
    assert path.stat().st_size < 1_000_000


def test_quota(path: Path) -> None:
    policy = Policy(batch_keys=2)
    with closing(RetransmittingStore(SqliteBackend(path, max_bytes=300), policy)) as store:
        results = store.put_many(["a", "b", "c"], [bytes(80), bytes(80), bytes(100)])
        assert [isinstance(result, Ok) for result in results] == [True, True, False]
        assert results[2] == NoSpace("quota")
        assert isinstance(store.put_many(["b"], [bytes(180)])[0], Ok)  # what it replaces does not count
        assert store.get_many(["c"]) == [MISSING]


def test_a_damaged_value_is_corrupt_and_not_data(path: Path) -> None:
    with closing(RetransmittingStore(SqliteBackend(path))) as store:
        store.put_many(["a", "b", "c"], [b"payload", b"x", b"y"])
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE blobs SET frame = substr(frame, 1, 25) WHERE key = 'a'")
            db.execute("UPDATE blobs SET frame = ? WHERE key = 'b'", (encode("c", b"x").join(),))
        assert store.get_many(["a", "b", "c"]) == [Corrupt("short"), Corrupt("checksum"), Ok(b"y")]


def test_a_file_that_another_process_writes_to_is_waited_for(path: Path) -> None:
    with closing(RetransmittingStore(SqliteBackend(path), Policy(retries=0))) as store:
        store.put_many(["a"], [b"1"])
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store.put_many(["a"], [b"2"], timeout_s=0.1) == [Transient("SQLITE_BUSY")]
            assert store.get_many(["a"]) == [Ok(b"1")]
            other.execute("ROLLBACK")
        assert isinstance(store.put_many(["a"], [b"2"])[0], Ok)


def test_a_full_database_is_no_space_and_loses_nothing(path: Path) -> None:
    backend = SqliteBackend(path)
    with closing(RetransmittingStore(backend)) as store:
        store.put_many(["a"], [b"kept"])
        pages = backend._writer._db.execute("PRAGMA page_count").fetchone()[0]
        backend._writer._db.execute(f"PRAGMA max_page_count = {pages + 4}")
        assert store.put_many(["b"], [bytes(1 << 20)]) == [NoSpace("SQLITE_FULL")]
        assert store.get_many(["a", "b"]) == [Ok(b"kept"), MISSING]
        assert isinstance(store.put_many(["c"], [b"small"])[0], Ok)


def test_what_is_no_store_is_left_alone(tmp_path: Path, path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no database\n" * 100)
    with pytest.raises(StoreUnusableError, match=r"notes\.txt cannot be used as a store: .*SQLITE_NOTADB"):
        SqliteBackend(text)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(StoreUnusableError, match="no store of this version"):
        SqliteBackend(path)
    with pytest.raises(StoreUnusableError, match="SQLITE_CANTOPEN"):
        SqliteBackend(tmp_path / "nowhere" / "x.db")


def test_after_closing(path: Path) -> None:
    backend = SqliteBackend(path)
    backend.close()
    assert backend.get_batch(["a"], 1) == [Invalid("closed")]
