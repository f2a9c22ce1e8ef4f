"""The real admin API over a fake control port, on real sockets, for raw clients and for the commands.

In a thread, on the event loop that control runs on.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import AdminAuth, Trusting
from pointsman.admin_api.server import AdminRunner
from tests.fakes.control_port import FakeControlPort
from tests.fakes.leeway import SLOW_MACHINE

TIMEOUT_S = 10.0 * SLOW_MACHINE


@dataclass
class AdminServer:
    port: FakeControlPort
    tcp: tuple[str, int]
    unix: Path

    @property
    def host_port(self) -> str:
        return f"{self.tcp[0]}:{self.tcp[1]}"


@contextmanager
def admin_server(
    folder: Path,
    *,
    auth: AdminAuth | None = None,
    host_names: Collection[str] = (),
    port: FakeControlPort | None = None,
    sock: socket.socket | None = None,
    **runner_options: Any,
) -> Iterator[AdminServer]:
    """A unix socket that trusts everybody, and TCP (or `sock`) with `auth` (default: trusts everybody too)."""
    control = port or FakeControlPort()
    path = folder / "admin.sock"
    started: Future[tuple[tuple[str, int], Callable[[], object]]] = Future()

    async def serve() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        tcp = AdminRunner(build_app(control, auth=auth or Trusting(), host_names=host_names), **runner_options)
        unix = AdminRunner(build_app(control, auth=Trusting()), **runner_options)
        for runner in (tcp, unix):
            await runner.setup()
        await (web.SockSite(tcp, sock) if sock else web.TCPSite(tcp, "127.0.0.1", 0)).start()
        await web.UnixSite(unix, str(path)).start()
        host, number = tcp.addresses[0][:2]
        started.set_result(((host, number), lambda: loop.call_soon_threadsafe(stopped.set)))
        await stopped.wait()
        for runner in (tcp, unix):
            await runner.cleanup()

    thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
    thread.start()
    address, stop = started.result(TIMEOUT_S)
    try:
        yield AdminServer(control, address, path)
    finally:
        stop()
        thread.join(TIMEOUT_S)
