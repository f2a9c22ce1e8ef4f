"""The admin API on the sockets that the supervisor bound: the unix socket trusts its mode, TCP asks for a token.

Fan-outs of the data port come in over a socket of control's own, from the shards.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from pointsman.admin_api.app import build_app, build_fanout_app, build_metrics_app
from pointsman.admin_api.auth import BearerTokens, Trusting
from pointsman.admin_api.changes import Changes
from pointsman.admin_api.passed_on import TokenOrNetwork
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.server import AdminRunner
from pointsman.admin_api.tokens import open_tokens
from pointsman.config import places
from pointsman.config.settings import Settings

SHUTDOWN_S = 0.5
"""for answers under way; whoever waits for a generation has been told by then"""


class AdminServers:
    def __init__(self, runners: Sequence[web.AppRunner]) -> None:
        self._runners = runners

    async def close_doors(self) -> None:
        """Who connects from now on waits for another process; requests under way go on."""
        for runner in self._runners:
            for site in list(runner.sites):
                await site.stop()

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()


async def serve(
    port: ControlPort, settings: Settings, sockets: Sequence[socket.socket], changes: Changes
) -> AdminServers:
    """`sockets`: of the admin API, then those for metrics and probes alone, as the settings name them.

    Raises ConfigErrors when TCP needs a token and there is none.
    """
    runners: list[web.AppRunner] = []
    admin, metrics = sockets[: len(settings.admin_listen)], sockets[len(settings.admin_listen) :]
    local = [sock for sock in admin if sock.family == socket.AF_UNIX]
    remote = [sock for sock in admin if sock.family != socket.AF_UNIX]
    if local:
        app = build_app(port, auth=Trusting(), changes=changes)
        runners.append(await _serve(app, local))
    is_asking = settings.admin_on_data_port or (settings.admin_auth and bool(remote))
    tokens = BearerTokens(open_tokens(settings)) if is_asking else None
    if remote:
        auth = tokens if tokens is not None and settings.admin_auth else Trusting()
        names = [where for where in settings.admin_listen if not where.startswith("unix:")]
        # a request by the name that is configured is as much ours as one by address
        app = build_app(port, auth=auth, host_names=names, changes=changes)
        runners.append(await _serve(app, remote))
    if tokens is not None and settings.admin_on_data_port:
        app = build_fanout_app(port, auth=TokenOrNetwork(tokens, settings.admin_networks), changes=changes)
        runners.append(await _serve(app, [_fanout_socket(Path(settings.runtime_dir) / places.FANOUT_SOCKET)]))
    if metrics:
        runners.append(await _serve(build_metrics_app(port), metrics))
    return AdminServers(runners)


def _fanout_socket(path: Path) -> socket.socket:
    """Bound by this process, so that shards are refused at once while there is none. Whoever had it has yielded."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # for processes of our own user
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)
    return sock


async def _serve(app: web.Application, sockets: Sequence[socket.socket]) -> web.AppRunner:
    runner = AdminRunner(app, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    for sock in sockets:
        await web.SockSite(runner, sock).start()
    return runner
