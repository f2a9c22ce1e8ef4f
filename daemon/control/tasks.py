"""The one owner of control's background work: nothing here fails in silence, and nothing outlives a stop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from pointsman.daemon.telemetry.logs import log

RESTART_PAUSE_S = 1.0
MAX_FAILURES = 5
FAILURE_WINDOW_S = 60.0
STOP_WAIT_S = 1.0


class Tasks:
    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to the name of a task that fails again and again: the process had better be replaced."""

    def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` for good: an exception is logged and it is started again, a return ends it."""
        self.spawn(name, self._kept(name, work))

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` once; an exception is logged."""
        if self._is_stopping:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def stop(self) -> None:
        self._is_stopping = True
        running = set(self._running)
        for task in running:
            task.cancel()
        if running:
            _, stuck = await asyncio.wait(running, timeout=STOP_WAIT_S)
            for task in stuck:
                log("task_stuck", level="error", task=task.get_name())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log("task_failed", level="error", task=task.get_name(), reason=repr(error))

    async def _kept(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        failures: deque[float] = deque(maxlen=MAX_FAILURES)
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - the boundary of all background work: log, then try again
                log("task_failed", level="error", task=name, reason=repr(error))
            else:
                return
            failures.append(time.monotonic())
            if len(failures) == MAX_FAILURES and failures[-1] - failures[0] < FAILURE_WINDOW_S:
                self.give_up(name, "fails again and again")
                return
            await asyncio.sleep(RESTART_PAUSE_S)

    def give_up(self, name: str, reason: object) -> None:
        log("task_given_up", level="error", task=name, reason=repr(reason))
        if not self.gave_up.done():
            self.gave_up.set_result(name)
