"""A pytest plugin for TransferQueue's own tests: our storage client in the place of its own, on a real Mooncake master.

Used by scripts/check-transferqueue, which names what the tests of that release ask for.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pointsman.daemon.stores.transferqueue import MooncakeStoreClient
from tests.daemon.stores.servers import mooncake_cluster

BACKEND = "MooncakeStore"
_servers = ExitStack()


class Ours(MooncakeStoreClient):
    """Counts, so that a run in which nobody used it does not pass."""

    puts = 0

    def put(self, keys: Any, values: Any) -> list[None]:
        Ours.puts += 1
        return super().put(keys, values)


def pytest_configure() -> None:
    folder = Path(_servers.enter_context(tempfile.TemporaryDirectory()))
    cluster = _servers.enter_context(mooncake_cluster(folder))
    os.environ |= {
        "TQ_TEST_BACKEND": BACKEND,
        "TQ_MOONCAKE_METADATA_SERVER": "P2PHANDSHAKE",
        "TQ_MOONCAKE_MASTER_SERVER": cluster.address,
    }
    clients: Any = importlib.import_module("transfer_queue.storage.clients")
    assert "MooncakeStoreClient" in clients.StorageClientFactory._registry
    clients.StorageClientFactory._registry["MooncakeStoreClient"] = Ours


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The master runs already."""
    for module in {item.getparent(pytest.Module) for item in items}:
        assert module is not None
        module.obj.BACKEND_CONFIGS[BACKEND]["backend"][BACKEND]["auto_init"] = False


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and not Ours.puts:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_unconfigure() -> None:
    _servers.close()
