"""What every store promises, over every backend: the scripted one, SQLite, a real Redis, a real Mooncake."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointsman.daemon.stores.cancellation import Cancellation
from pointsman.daemon.stores.framing import Json, Opaque, Storable, Tensor
from pointsman.daemon.stores.open_store import open_store
from pointsman.daemon.stores.results import MISSING, Invalid, Missing, Ok, Stat, Transient, Written, require_all
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from tests.daemon.stores.scripted import ScriptedBackend
from tests.daemon.stores.servers import needs_mooncake, needs_redis

BACKENDS = [
    "scripted",
    "sqlite",
    pytest.param("redis", marks=needs_redis),
    pytest.param("mooncake", marks=needs_mooncake),
]


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RetransmittingStore]:
    match request.param:
        case "scripted":
            found = RetransmittingStore(ScriptedBackend())
        case "sqlite":
            found = open_store(f"sqlite:{tmp_path}/blobs.db")
        case "redis":
            found = open_store(f"{request.getfixturevalue('redis_url')}?prefix={tmp_path.name}/")
        case _:
            found = open_store(f"mooncake://{request.getfixturevalue('mooncake_address')}")
    yield found
    found.close()


@pytest.fixture
def some(tmp_path: Path) -> str:
    """A prefix for keys that no other test has: the servers are shared."""
    return f"{tmp_path.name}/"


ODD: dict[str, Storable] = {
    "empty bytes": b"",
    "empty text": "",
    "none": None,
    "zero": b"\0",
    "text": "é\ud800\0",
    "json": Json({"a": [None, True, 1, 2.5]}),
    "null": Json(None),
    "tensor": Tensor("bfloat16", (2, 3), bytes(range(12))),
    "no elements": Tensor("<f4", (0, 3), b""),
    "scalar": Tensor("<f4", (), b"abcd"),
    "opaque": Opaque("pickle", b"N."),
}


def test_what_goes_in_comes_out_exactly(store: RetransmittingStore, some: str) -> None:
    keys = [some + name for name in ODD]
    written = store.put_many(keys, list(ODD.values()))
    assert written == [Ok(Written())] * len(keys)
    for value, result in zip(ODD.values(), store.get_many(keys), strict=True):
        assert result == Ok(value)
        assert type(getattr(result, "value", result)) is type(value)


def test_missing_is_not_empty_and_not_none(store: RetransmittingStore, some: str) -> None:
    keys = [some + name for name in ("a", "b", "c", "d")]
    store.put_many([keys[0], keys[2]], [b"", None])
    assert store.get_many(keys) == [Ok(b""), MISSING, Ok(None), MISSING]
    stats = store.stat_many(keys)
    assert [isinstance(stat, Ok) for stat in stats] == [True, False, True, False]
    assert stats[0] == Ok(Stat(20)) and stats[1] == Missing()
    assert store.delete_many(keys) == [Ok(None), MISSING, Ok(None), MISSING]
    assert store.get_many(keys) == [MISSING] * 4


def test_a_write_overwrites_with_any_size(store: RetransmittingStore, some: str) -> None:
    for value in (b"first", b"a longer second", b"3", b""):
        require_all("put", [some], store.put_many([some], [value]))
        assert store.get_many([some]) == [Ok(value)]


def test_order_over_many_batches(store: RetransmittingStore, some: str) -> None:
    keys = [f"{some}{number}" for number in range(1500)]
    values = [random.Random(number).randbytes(number) for number in range(1500)]
    require_all("put", keys, store.put_many(keys, values))
    places = random.Random(1).sample(range(1500), 1500)
    assert require_all("get", keys, store.get_many([keys[place] for place in places])) == [values[p] for p in places]
    require_all("delete", keys, store.delete_many(keys))


def test_one_key_several_times(store: RetransmittingStore, some: str) -> None:
    assert store.put_many([some, some], [b"1", b"2"]) == [Ok(Written()), Invalid("duplicate_key")]
    assert store.get_many([some, some]) == [Ok(b"1")] * 2


def test_keys_of_all_kinds(store: RetransmittingStore, some: str) -> None:
    keys = [some + "é ☃", some + "a\nb", some + "x" * (1000 - len(some)), some + "{tag}*?[a]"]
    values = [key.encode() for key in keys]
    require_all("put", keys, store.put_many(keys, values))
    assert require_all("get", keys, store.get_many(keys)) == values


def test_a_value_larger_than_a_batch(store: RetransmittingStore, some: str) -> None:
    small = RetransmittingStore(store.backend, Policy(batch_bytes=100_000))
    value = random.Random(1).randbytes(900_000)
    keys = [some + "large", some + "small"]
    require_all("put", keys, small.put_many(keys, [value, b"x"]))
    assert small.get_many(keys) == [Ok(value), Ok(b"x")]


def test_no_time_is_no_attempt(store: RetransmittingStore, some: str) -> None:
    assert store.put_many([some], [b"x"], timeout_s=0) == [Transient("deadline")]
    assert store.get_many([some]) == [MISSING]


def test_cancelled_before_it_began(store: RetransmittingStore, some: str) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    assert store.put_many([some], [b"x"], cancellation=cancellation) == [Transient("cancelled")]
    assert store.get_many([some]) == [MISSING]


def test_the_callers_buffers_are_free_afterwards(store: RetransmittingStore, some: str) -> None:
    value = bytearray(b"value")
    require_all("put", [some], store.put_many([some], [value]))
    value.clear()
    assert store.get_many([some]) == [Ok(b"value")]
    view = bytearray(b"other")
    require_all("put", [some], store.put_many([some], [memoryview(view)]))
    view.clear()


def test_closed_for_good(store: RetransmittingStore, some: str) -> None:
    store.close()
    assert store.get_many([some]) == [Transient("cancelled")]
    store.close()
