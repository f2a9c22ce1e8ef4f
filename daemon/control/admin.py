"""The admin API on the sockets that the supervisor bound: the unix socket trusts its mode, TCP asks for a token."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from aiohttp import web

from pointsman.admin_api.app import build_app, build_metrics_app
from pointsman.admin_api.auth import BearerTokens, Trusting
from pointsman.admin_api.changes import Changes
from pointsman.admin_api.ports import ControlPort
from pointsman.admin_api.server import AdminRunner
from pointsman.admin_api.tokens import open_tokens
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
    if remote:
        auth = BearerTokens(open_tokens(settings)) if settings.admin_auth else Trusting()
        names = [where for where in settings.admin_listen if not where.startswith("unix:")]
        # a request by the name that is configured is as much ours as one by address
        app = build_app(port, auth=auth, host_names=names, changes=changes)
        runners.append(await _serve(app, remote))
    if metrics:
        runners.append(await _serve(build_metrics_app(port), metrics))
    return AdminServers(runners)


async def _serve(app: web.Application, sockets: Sequence[socket.socket]) -> web.AppRunner:
    runner = AdminRunner(app, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    for sock in sockets:
        await web.SockSite(runner, sock).start()
    return runner
