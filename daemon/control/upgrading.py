"""Control's part in an upgrade: it passes the wish on, and answers when the supervisor has said what came of it.

The answer comes from the old daemon also when it has given up its sockets: the connection on which it was asked stays.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from pointsman.admin_api.ports import UpgradeView
from pointsman.config.settings import Settings
from pointsman.daemon.control.channel import Channel
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.leash import Message
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.pause import Mode, Pause
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.version import VERSION

GIVE_UP_MARGIN_S = 5.0
"""after the supervisor's own patience: then it has not heard us"""


class Upgrader:
    def __init__(self, channel: Channel, segment: Segment, settings: Settings, is_over: Callable[[], None]) -> None:
        """`is_over`: the supervisor has said what came of it, and the answer is on its way."""
        self._channel = channel
        self._segment = segment
        self._settings = settings
        self._is_over = is_over
        self._outcome: asyncio.Future[Message] | None = None
        for kind in ("upgraded", "upgrade_refused", "upgrade_failed"):
            channel.on(kind, lambda message, _: self._heard(message))

    def check_none(self) -> None:
        """What must not happen while another daemon takes over. Raises RequestError 409."""
        if self._outcome is not None:
            raise _error(409, "UPGRADE_RUNS", "an upgrade is under way; ask again when it is over")

    async def run(self, timeout_s: float) -> UpgradeView:
        """Raises RequestError: 409 not now, 500 it failed, and this daemon goes on."""
        if self._outcome is not None:
            raise _error(409, "UPGRADE_REFUSED", "another upgrade is under way")
        if Pause(self._segment).mode is not Mode.RUNNING:
            raise _error(
                409, "UPGRADE_REFUSED", "the gateway is paused, and the next one would not be: resume it first"
            )
        started = time.monotonic()
        self._outcome = asyncio.get_running_loop().create_future()
        self._channel.send(Message("upgrade", timeout_s=timeout_s))
        try:
            async with asyncio.timeout(timeout_s + GIVE_UP_MARGIN_S):
                message = await self._outcome
        except TimeoutError:
            raise _error(500, "UPGRADE_FAILED", "the supervisor does not say what came of it") from None
        finally:
            self._outcome = None
        if message.kind == "upgraded":
            return self._view(message, time.monotonic() - started)
        if message.kind == "upgrade_refused":
            raise _error(409, "UPGRADE_REFUSED", message.reason)
        raise _error(500, "UPGRADE_FAILED", f"{message.reason}; version {VERSION} goes on unchanged")

    def _heard(self, message: Message) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(message)
        self._is_over()

    def _view(self, message: Message, took_s: float) -> UpgradeView:
        return UpgradeView(
            version=message.version,
            pid=message.pid,
            previous_version=VERSION,
            previous_pid=os.getppid(),
            in_flight=self._segment.gauge_total(at.G_REQUESTS),
            grace_s=self._settings.upgrade_grace_s,
            took_s=round(took_s, 3),
        )


def _error(status: int, code: str, message: str) -> RequestError:
    return RequestError(status, code, message, fault=Fault.OPERATOR, type="server_error")
