from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.stores.fake_torch import fake_module
from tests.daemon.stores.servers import Cluster, mooncake_cluster, redis_server


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def mooncake_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a master with two holders of 64 MiB that nobody harms."""
    with mooncake_cluster(tmp_path_factory.mktemp("mooncake")) as cluster:
        cluster.start_holder()
        cluster.start_holder()
        yield cluster.address


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A master of the test's own, without holders."""
    with mooncake_cluster(tmp_path) as found:
        yield found


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faketorch", fake_module())
