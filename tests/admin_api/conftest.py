from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import Trusting
from tests.fakes.control_port import FakeControlPort

Client = TestClient[web.Request, web.Application]


@pytest.fixture
def port() -> FakeControlPort:
    return FakeControlPort()


@pytest.fixture
async def client(aiohttp_client: Callable[[web.Application], Awaitable[Any]], port: FakeControlPort) -> Any:
    return await aiohttp_client(build_app(port, auth=Trusting()))
