from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
import redis

from pointsman.daemon.stores.open_store import open_store
from pointsman.daemon.stores.redis_store import RedisBackend
from pointsman.daemon.stores.results import MISSING, Corrupt, Invalid, NoSpace, Ok, Transient, Written
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from tests.daemon.stores.servers import needs_redis, redis_server

pytestmark = needs_redis

ONCE = Policy(retries=0)


def test_time_to_live(redis_url: str) -> None:
    with closing(open_store(f"{redis_url}?prefix=ttl/")) as store:
        assert store.put_many(["a"], [b"x"], ttl_s=100) == [Ok(Written())]
        (stat,) = store.stat_many(["a"])
        assert isinstance(stat, Ok) and stat.value.ttl_s is not None and 90 < stat.value.ttl_s <= 100
        store.put_many(["a"], [b"x"])
        (stat,) = store.stat_many(["a"])
        assert isinstance(stat, Ok) and stat.value.ttl_s is None


def test_prefix_and_database_keep_stores_apart(redis_url: str) -> None:
    with (
        closing(open_store(f"{redis_url}/3?prefix=p/")) as one,
        closing(open_store(f"{redis_url}/3")) as other,
        closing(open_store(f"{redis_url.replace('redis', 'valkey', 1)}/4")) as third,
    ):
        one.put_many(["a"], [b"x"])
        assert one.get_many(["a"]) == [Ok(b"x")]
        assert other.get_many(["a"]) == third.get_many(["p/a"]) == [MISSING]
        assert other.get_many(["p/a"]) == [Corrupt("checksum")]  # there, but not under the key it was written for


def test_a_unix_socket(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--unixsocket", "s"), closing(open_store(f"unix://{tmp_path}/s")) as store:
        assert store.put_many(["a"], [b"x"]) == [Ok(Written())]


@pytest.mark.parametrize("ttl_s", [None, 60.0])
def test_a_full_server(tmp_path: Path, ttl_s: float | None) -> None:
    with redis_server(tmp_path, "--maxmemory", "1") as url, closing(open_store(url)) as store:
        assert store.put_many(["a", "b"], [b"x", b"y"], ttl_s=ttl_s) == [NoSpace("OOM")] * 2
        assert store.totals().retried == 0


def test_a_server_that_wants_a_password(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--requirepass", "secret") as url:
        with closing(open_store(url)) as store:
            assert store.put_many(["a"], [b"x"]) == [Invalid("NOAUTH")]
            assert store.stat_many(["a"]) == [Invalid("NOAUTH")]
        with closing(open_store(url.replace("//", "//:secret@"))) as store:
            assert store.put_many(["a"], [b"x"]) == [Ok(Written())]


def test_foreign_values(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    client.set("foreign/text", b"hello")
    client.rpush("foreign/list", "x")
    client.close()
    with closing(open_store(f"{redis_url}?prefix=foreign/")) as store:
        assert store.get_many(["text"]) == [Corrupt("short")]
        assert store.stat_many(["list"]) == [Invalid("WRONGTYPE")]


def test_away_and_back(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        store = open_store(url, ONCE)
        store.put_many(["a"], [b"x"])
    assert store.get_many(["a", "b"]) == [Transient("connection")] * 2
    store.close()


def test_a_stopped_server_costs_the_socket_timeout(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        client = redis.Redis.from_url(url)
        info = cast("dict[str, int]", client.info())
        client.close()
        with closing(RetransmittingStore(RedisBackend(url, socket_timeout_s=0.2), ONCE)) as store:
            os.kill(info["process_id"], signal.SIGSTOP)
            assert store.get_many(["a"]) == [Transient("timeout")]
            os.kill(info["process_id"], signal.SIGCONT)
            assert store.get_many(["a"]) == [MISSING]
