"""One reload: files -> rules and registry -> one generation. A watch, SIGHUP and the admin API all come here.

Each file is a transaction of its own (a bad workers file does not hold up good profiles), and what all good files say
is published together. A bad file leaves its last good content in force, whole.

When the shards cannot load a generation, what it has from the files is taken back; workers are not: they cannot be the
reason, and the publisher tries again. A rollout that is only late (a shard hangs and is being replaced) takes nothing
back: another reload follows, to say so when it is done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from msgspec.structs import replace

from pointsman.config.load import DeclaredWorker
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon.control import files
from pointsman.daemon.control.desired import access_in, cross_check, rules_in, rules_of
from pointsman.daemon.control.publisher import NotPublished
from pointsman.daemon.errors import ConfigError, ConfigErrors
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.locate import Locator, declared
from pointsman.daemon.workers.registry import Changes, Registry, SlotsExhausted


class Reloader:
    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        locator: Locator,
        last: Snapshot,
        settle: Callable[[Changes], Awaitable[None]],
        again: Callable[[], None],
    ) -> None:
        """`last` is in force; `settle` publishes, or raises NotPublished; `again` makes another reload happen soon."""
        self._settings = settings
        self._registry = registry
        self._locator = locator
        self._settle = settle
        self._again = again
        self._lock = asyncio.Lock()
        self._baseline: Mapping[str, object] = {}
        self.rules = rules_in(last)
        self.access = access_in(last)
        self.errors: tuple[ConfigError, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._profile_warnings: tuple[str, ...] = ()
        self.pending_restart: tuple[str, ...] = ()
        self.last_at: float | None = None
        self.last_ok_at: float | None = None
        self.lacks_slots = False
        """The workers file was refused for want of slots; removed workers may still hold some."""
        self.is_workers_file_bad = False

    @property
    def is_ok(self) -> bool:
        return not self.errors

    async def start(self, started_ns: int) -> Changes:
        """The first reading: rules and registry are filled, nothing is published; defects are in `errors`."""
        async with self._lock:
            reading = await asyncio.to_thread(files.read, self._settings)
            self._baseline = files.baseline(self._settings, reading, started_ns)
            changes = await self._take(reading)
            self._record(reading)
            return changes

    async def reload(self) -> None:
        """Never fails: what was wrong is in `errors`."""
        async with self._lock:
            reading = await asyncio.to_thread(files.read, self._settings)
            last = self.rules, self.access
            changes = await self._take(reading)
            try:
                await self._settle(changes)
            except NotPublished as error:
                reading.errors.append(ConfigError("reload", error.message))
                if error.is_final:
                    self.rules, self.access = last
                else:
                    self._again()
            self._record(reading)

    async def _take(self, reading: files.Reading) -> Changes:
        if reading.profiles is not None:
            self.rules = rules_of(reading.profiles)
            self._profile_warnings = reading.profiles.warnings
        self.access = replace(self.access, **reading.access)
        self.lacks_slots = False
        self.is_workers_file_bad = reading.workers is None
        if reading.workers is None:
            return Changes()
        try:
            return await self._declare(reading.workers)
        except ConfigErrors as error:
            self.is_workers_file_bad = True
            reading.errors += error.errors
            return Changes()

    async def _declare(self, workers: tuple[DeclaredWorker, ...]) -> Changes:
        located = await self._locator.locate(declared(workers))
        path = self._settings.workers_file or ""
        if located.refused:
            raise ConfigErrors(
                [ConfigError(path, reason, key="url", line=worker.line) for worker, reason in located.refused]
            )
        try:
            return self._registry.declare("file", located.candidates)
        except SlotsExhausted as error:
            self.lacks_slots = True
            raise ConfigErrors([ConfigError(path, str(error), key="workers")]) from None

    def _record(self, reading: files.Reading) -> None:
        self.errors = tuple(reading.errors)
        self.warnings = (*self._profile_warnings, *reading.key_warnings, *cross_check(self.access, self.rules))
        self.pending_restart = files.changed_keys(self._baseline, reading.config)
        self.last_at = time.time()
        if not self.errors:
            self.last_ok_at = self.last_at
        for error in self.errors:
            log("config_refused", level="error", place=_place(error), key=error.key, problem=str(error))
        for warning in self.warnings:
            log("config_warning", level="warning", warning=warning)
        log("config_read", ok=self.is_ok, pending_restart=self.pending_restart)


def _place(error: ConfigError) -> str:
    return ":".join(map(str, (error.source, error.line, error.column))) if error.line else error.source
