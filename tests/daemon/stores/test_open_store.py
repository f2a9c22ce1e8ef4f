from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import pytest

from pointsman.daemon.stores.mooncake_process import ChildError, MooncakeProcess
from pointsman.daemon.stores.mooncake_wire import Request, Setup
from pointsman.daemon.stores.open_store import open_store, sqlite_url, without_password
from pointsman.daemon.stores.problems import BackendMissingError, StoreUrlError
from pointsman.daemon.stores.results import Ok, Written


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "names no store: use sqlite:PATH"),
        ("blobs.db", "names no store"),
        ("sqlit:x", "did you mean 'sqlite'"),
        ("sqlite:", "the path is missing"),
        ("sqlite://host/x", "the path is missing"),
        ("sqlite:x?synchronus=full", "unknown option 'synchronus' (did you mean 'synchronous'?)"),
        ("sqlite:x?synchronous=off", "synchronous is one of full, normal, not 'off'"),
        ("sqlite:x?max_bytes=1GB", "max_bytes is a whole number from 0, not '1GB'"),
        ("sqlite:x?max_bytes", "is not name=value"),
        ("redis:host", "redis: is followed by //"),
        ("redis://host/zero", "the path is the number of a database"),
        ("redis://host:port", "Port could not be cast"),
        ("redis://host?socket_timeout=3", "unknown option 'socket_timeout'"),
        ("mooncake://host", "followed by HOST:PORT of the master"),
        ("mooncake://host:1/x", "nothing but options"),
        ("mooncake://host:1?metadata=redis://x", "use P2PHANDSHAKE, http:// or etcd://"),
        ("mooncake://host:1?hostname=me:17", "hostname has no port"),
        ("mooncake://host:1?replicas=0", "replicas is a whole number from 1"),
        ("mooncake://host:1?replicas=1&min_replicas=2", "min_replicas=2 is more than replicas=1"),
        ("mooncake://host:1?protocol=udp", "protocol is one of tcp, rdma"),
    ],
)
def test_what_is_wrong_with_a_url(url: str, problem: str) -> None:
    with pytest.raises(StoreUrlError) as caught:
        open_store(url)
    assert problem in str(caught.value)


def test_passwords_stay_out_of_messages() -> None:
    with pytest.raises(StoreUrlError) as caught:
        open_store("redis://user:secret@host?x=1")
    assert "secret" not in str(caught.value) and "host" in str(caught.value)
    assert without_password("redis://:p@ss@host/0") == "redis://…@host/0"


@pytest.mark.parametrize("form", ["sqlite:{}", "sqlite://{}", "sqlite:{}?synchronous=normal&max_bytes=1000000"])
def test_sqlite_paths(tmp_path: Path, form: str) -> None:
    with closing(open_store(form.format(tmp_path / "a b.db"))) as store:
        assert store.put_many(["a"], [b"x"]) == [Ok(Written())]
    assert (tmp_path / "a b.db").exists()


def test_the_url_of_a_path_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a b?c=d%20#é.db"
    open_store(sqlite_url(path)).close()
    assert path.exists()


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("sqlite:x.db").close()
    assert (tmp_path / "x.db").exists()


def test_without_the_redis_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(BackendMissingError, match=r"install it with: pip install 'pointsman\[redis\]'"):
        open_store("redis://127.0.0.1")


SETUP = Setup("127.0.0.1", "P2PHANDSHAKE", 0, 1, "tcp", "", "127.0.0.1:1", True, 1)
FAKE = """
import ctypes, time
class ReplicateConfig: pass
class MooncakeDistributedStore:
    def setup(self, *arguments): return {setup}
    def batch_remove(self, keys, force): {remove}
    def batch_get_replica_desc(self, keys): return {{}}
    def batch_is_exist(self, keys): return [0] * len(keys)
"""


def process(tmp_path: Path, module: str, watchdog_s: float = 10.0) -> MooncakeProcess:
    """With a wheel of our own making."""
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "store.py").write_text(module)
    return MooncakeProcess(SETUP, lanes=2, watchdog_s=watchdog_s, environment={"PYTHONPATH": str(tmp_path)})


def test_without_the_mooncake_wheel_or_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(BackendMissingError) as caught:
        process(tmp_path, "raise ImportError('libibverbs.so.1: cannot open shared object file')")
    assert "libibverbs.so.1" in str(caught.value)
    assert "pip install 'pointsman[mooncake]'; on Debian also: apt-get install libibverbs1" in str(caught.value)


def test_a_setup_that_fails_is_tried_again_at_the_next_call(tmp_path: Path) -> None:
    with closing(process(tmp_path, FAKE.format(setup=-1, remove="pass"))) as client:
        for _ in range(2):
            with pytest.raises(ChildError, match="setup_failed"), client.lane(10):
                pytest.fail("there is no lane")
        assert client.starts == 2 and client.pid is None


@pytest.mark.parametrize(
    ("what", "code"),
    [("ctypes.string_at(0)", "child_died"), ("time.sleep(60)", "child_hung"), ("return [0]", "child_died")],
)
def test_a_client_that_crashes_hangs_or_talks_nonsense_is_replaced(tmp_path: Path, what: str, code: str) -> None:
    with closing(process(tmp_path, FAKE.format(setup=0, remove=what))) as client:
        with pytest.raises(ChildError, match=code), client.lane(10) as lane:
            lane.call(Request("remove", ["a", "b"]), 0.5)
        assert client.pid is None
        with client.lane(10) as lane:
            assert lane.call(Request("look", ["a"]), 10).numbers == [-704]
        assert client.starts == 2


def test_a_closed_client_stays_closed(tmp_path: Path) -> None:
    client = process(tmp_path, FAKE.format(setup=0, remove="pass"))
    client.close()
    client.close()
    with pytest.raises(ChildError, match="closed"), client.lane(1):
        pytest.fail("there is no lane")
