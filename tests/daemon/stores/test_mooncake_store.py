"""Against a real master and real holders, which are killed here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pointsman.daemon.stores.mooncake_store import MooncakeBackend, MooncakeOptions
from pointsman.daemon.stores.open_store import open_store
from pointsman.daemon.stores.results import Missing, NoSpace, Ok, Stat, Transient, Written, require_all
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from tests.daemon.stores.servers import Cluster, kill, mooncake_cluster, needs_mooncake
from tests.fakes.processes import wait_gone, wait_until

pytestmark = needs_mooncake

KEYS = [f"k{number}" for number in range(60)]
VALUES = [key.encode() * 100 for key in KEYS]
QUICK = Policy(retries=2, base_s=0.2)
PATIENT = Policy(retries=5, base_s=0.5)
"""longer than the master of `cluster` takes to give up a dead holder, as the default is for a master's default"""


def child_of(store: RetransmittingStore) -> int:
    assert isinstance(store.backend, MooncakeBackend)
    pid = store.backend.process.pid
    assert pid is not None
    return pid


@pytest.mark.slow
def test_a_dead_holder_harms_nothing_that_has_two_copies(cluster: Cluster) -> None:
    first, _ = cluster.start_holder(), cluster.start_holder()
    with closing(open_store(f"mooncake://{cluster.address}?replicas=2", PATIENT)) as store:
        assert store.put_many(KEYS, VALUES) == [Ok(Written(replicas=2))] * len(KEYS)
        stat, *_ = store.stat_many(KEYS)
        assert isinstance(stat, Ok) and stat.value.replicas == 2
        kill(first)
        assert require_all("get", KEYS, store.get_many(KEYS)) == VALUES


@pytest.mark.slow
def test_of_a_dead_holder_exactly_its_keys_are_lost(cluster: Cluster) -> None:
    first = cluster.start_holder()
    with closing(open_store(f"mooncake://{cluster.address}", QUICK)) as store:
        require_all("put", KEYS[:30], store.put_many(KEYS[:30], VALUES[:30]))
        cluster.start_holder()
        kill(first)
        results = store.get_many(KEYS[:30])
        assert all(result in (Transient(-800), Missing()) for result in results)
    with closing(open_store(f"mooncake://{cluster.address}", PATIENT)) as store:
        require_all("put", KEYS[30:], store.put_many(KEYS[30:], VALUES[30:]))
        both = store.get_many(KEYS)
        assert both[:30] == [Missing()] * 30 and both[30:] == [Ok(value) for value in VALUES[30:]]


def test_fewer_holders_than_copies_asked_for(cluster: Cluster) -> None:
    cluster.start_holder()
    with closing(open_store(f"mooncake://{cluster.address}?replicas=2", Policy(retries=0))) as store:
        assert store.put_many(["a"], [b"x"]) == [Transient("under_replicated")]
    with closing(open_store(f"mooncake://{cluster.address}?replicas=2&min_replicas=1")) as store:
        assert store.put_many(["a"], [b"x"]) == [Ok(Written(replicas=1))]


def test_a_full_cluster_says_so_and_keeps_what_it_has(cluster: Cluster) -> None:
    cluster.start_holder(size_mib=16)
    with closing(open_store(f"mooncake://{cluster.address}", Policy(retries=1, base_s=0.05))) as store:
        values = [bytes([number]) * (1 << 20) for number in range(24)]
        results = store.put_many(KEYS[:24], values)
        assert NoSpace(-200) in results
        stored = [place for place, result in enumerate(results) if isinstance(result, Ok)]
        assert len(stored) >= 10
        names = [KEYS[place] for place in stored]
        assert require_all("get", names, store.get_many(names)) == [values[place] for place in stored]
        require_all("delete", names, store.delete_many(names))
        assert store.put_many(["again"], [values[0]]) == [Ok(Written())]


def test_the_masters_restart_loses_the_values_but_not_the_store(cluster: Cluster) -> None:
    cluster.start_holder()
    with closing(open_store(f"mooncake://{cluster.address}", Policy(retries=4, base_s=0.5))) as store:
        require_all("put", KEYS, store.put_many(KEYS, VALUES))
        kill(cluster.master)
        (result,) = store.get_many(["k1"], timeout_s=0.5)
        assert isinstance(result, Transient)
        cluster.start_master()
        require_all("put", KEYS, store.put_many(KEYS, VALUES, timeout_s=40))
        assert require_all("get", KEYS, store.get_many(KEYS)) == VALUES


@pytest.mark.slow
def test_no_master_yet(cluster: Cluster) -> None:
    kill(cluster.master)
    with closing(open_store(f"mooncake://{cluster.address}", Policy(retries=0))) as store:
        assert store.get_many(["a"], timeout_s=20) == [Transient("setup_failed")]
        cluster.start_master()
        cluster.start_holder()
        assert store.put_many(["a"], [b"x"]) == [Ok(Written())]


def test_a_value_larger_than_the_clients_buffer_and_the_lane(mooncake_address: str) -> None:
    with closing(open_store(f"mooncake://{mooncake_address}?buffer_bytes=4194304")) as store:
        value = os.urandom(45 << 20)
        assert store.put_many(["large", "small"], [value, b"x"]) == [Ok(Written())] * 2
        assert store.get_many(["large", "small"]) == [Ok(value), Ok(b"x")]
        assert store.stat_many(["large"]) == [Ok(Stat(len(value) + 20))]
        require_all("delete", ["large", "small"], store.delete_many(["large", "small"]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_client_is_replaced(mooncake_address: str, number: int) -> None:
    options = MooncakeOptions(mooncake_address, watchdog_s=2)
    with closing(RetransmittingStore(MooncakeBackend(options), QUICK)) as store:
        require_all("put", KEYS, store.put_many(KEYS, VALUES))
        before = child_of(store)
        os.kill(before, number)
        assert require_all("get", KEYS, store.get_many(KEYS)) == VALUES
        assert child_of(store) != before
        wait_gone([before], 5)
        assert store.totals().recovered == len(KEYS)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_client_dies_with_its_parent(mooncake_address: str, is_stopped: bool) -> None:
    program = (
        "import sys; from pointsman.daemon.stores.open_store import open_store\n"
        f"store = open_store('mooncake://{mooncake_address}'); store.get_many(['a'])\n"
        "print(store.backend.process.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if is_stopped:
            os.kill(child, signal.SIGSTOP)
        kill(parent)
    wait_gone([child], 5)


def test_closing_ends_the_client(mooncake_address: str) -> None:
    store = open_store(f"mooncake://{mooncake_address}")
    store.get_many(["a"])
    child = child_of(store)
    store.close()
    wait_gone([child], 1)


@pytest.mark.slow
def test_a_hung_holder_costs_seconds_not_half_a_minute(tmp_path: Path) -> None:
    with (
        mooncake_cluster(tmp_path, client_ttl_s=60) as cluster,
        closing(open_store(f"mooncake://{cluster.address}", Policy(retries=3, base_s=0.2))) as store,
    ):
        holder = cluster.start_holder()
        require_all("put", ["a"], store.put_many(["a"], [b"x"]))
        holder.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        (result,) = store.get_many(["a"], timeout_s=8)
        assert isinstance(result, Transient)
        assert time.monotonic() - started < 12
        holder.send_signal(signal.SIGCONT)

        def is_back() -> bool:
            return store.get_many(["a"]) == [Ok(b"x")]

        wait_until("the value is there again", is_back, 20)
