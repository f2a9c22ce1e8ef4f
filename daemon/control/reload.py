"""One reload: files -> rules and registry -> one generation. A watch, SIGHUP and the admin API all come here.

Each file is a transaction of its own (a bad workers file does not hold up good profiles), and what all good files say
is published together. A bad file leaves its last good content in force, whole.

When the shards cannot load a generation, what it has from the files is taken back; workers are not: they cannot be the
reason, and the publisher tries again. A rollout that is only late (a shard hangs and is being replaced) takes nothing
back: another reload follows, to say so when it is done.

Something else may be held in the place of a file (`holds`): then that file is read, and not taken, until it changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from msgspec.structs import replace

from pointsman.config.load import DeclaredWorker
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon.control import files
from pointsman.daemon.control.config_state import ConfigState
from pointsman.daemon.control.desired import Access, Rules, access_in, cross_check, rules_in, rules_of
from pointsman.daemon.control.history import Content, content_of
from pointsman.daemon.control.holds import KINDS, NOTHING_HELD, Holds
from pointsman.daemon.control.publisher import NotPublished
from pointsman.daemon.errors import ConfigError, ConfigErrors, Fault, RequestError
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.locate import Locator, declared
from pointsman.daemon.workers.registry import Changes, Registry, SlotsExhausted


@dataclass(frozen=True, slots=True)
class _InForce:
    """What a reload may have to come back to."""

    rules: Rules
    access: Access
    holds: Holds
    workers: tuple[DeclaredWorker, ...]


class Reloader:
    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        locator: Locator,
        last: Snapshot,
        state: ConfigState,
        settle: Callable[[Changes], Awaitable[None]],
        again: Callable[[], None],
    ) -> None:
        """`last` is in force; `settle` publishes, or raises NotPublished; `again` makes another reload happen soon."""
        self._settings = settings
        self._state = state
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
        self.holds = NOTHING_HELD
        self._saved_holds = NOTHING_HELD
        self.cause, self.by = "start", ""
        """of the last change, for the history"""
        self._has_read_profiles = False
        self._has_read_workers = False

    @property
    def is_ok(self) -> bool:
        return not self.errors

    @property
    def content(self) -> Content | None:
        """None while it is only known as it was compiled: a file was bad when this process began."""
        if not (self._has_read_profiles and self._has_read_workers):
            return None
        return content_of(self.rules, self._file_workers(), self.access)

    async def start(self, started_ns: int) -> Changes:
        """The first reading: rules and registry are filled, nothing is published; defects are in `errors`."""
        async with self._lock:
            reading = await self._read()
            self._baseline = files.baseline(self._settings, reading, started_ns)
            return await self._begin(reading)

    async def recall(self) -> Changes:
        """As `start`, when the state directory is ours: another daemon may have changed what is held."""
        async with self._lock:
            return await self._begin(await self._read())

    async def reload(self) -> None:
        """Never fails: what was wrong is in `errors`."""
        async with self._lock:
            reading = await self._read()
            before = self._in_force()
            self.cause, self.by = "files", ""
            changes = await self._take(reading, self.holds.after(reading.good_digests))
            try:
                await self._settle(changes)
            except NotPublished as error:
                reading.errors.append(ConfigError("reload", error.message))
                if error.is_final:
                    self.rules, self.access, self.holds = before.rules, before.access, before.holds
                else:
                    self._again()
            self._record(reading)
            await self._keep_holds()

    async def hold(self, change: Callable[[Holds, files.Reading], Holds], cause: str, by: str) -> None:
        """Have something else held, or nothing any more; the state directory has it before the shards do.

        Raises RequestError: all is then as it was. Only when the shards are late with it (503, retryable) it stays, and
        is tried again.
        """
        async with self._lock:
            reading = await self._read()
            before = self._in_force()
            wanted = change(self.holds.after(reading.good_digests), reading)
            await self._save_holds(wanted)
            self.cause, self.by = cause, by
            try:
                await self._enforce(reading, wanted)
            except RequestError as error:
                if isinstance(error, NotPublished) and not error.is_final:
                    self._again()
                else:
                    await self._take_back(before)
                raise
            finally:
                self._record(reading)

    # --- parts

    async def _read(self) -> files.Reading:
        return await asyncio.to_thread(files.read, self._settings)

    async def _begin(self, reading: files.Reading) -> Changes:
        self._saved_holds = await asyncio.to_thread(self._state.load_holds)
        holds = self._saved_holds.at(time.time())
        if holds != self._saved_holds:
            self.cause = "not confirmed"
        changes = await self._take(reading, holds.after(reading.good_digests))
        self._record(reading)
        return changes

    def _in_force(self) -> _InForce:
        return _InForce(self.rules, self.access, self.holds, self._file_workers())

    def _file_workers(self) -> tuple[DeclaredWorker, ...]:
        return tuple(worker for _, worker in self._registry.held_by("file"))

    async def _take(self, reading: files.Reading, holds: Holds) -> Changes:
        """What is wrong with workers is added to the errors; what was held in their file's place stays."""
        before = self.holds
        try:
            return await self._take_all(reading, holds)
        except ConfigErrors as error:
            self.holds = holds.with_workers_of(before)
            self.is_workers_file_bad = True
            reading.errors += error.errors
            return Changes()

    async def _enforce(self, reading: files.Reading, holds: Holds) -> None:
        """Raises RequestError 422, NotPublished."""
        try:
            changes = await self._take_all(reading, holds)
        except ConfigErrors as error:
            raise RequestError(422, "CONFIG_REFUSED", str(error), fault=Fault.OPERATOR) from None
        await self._settle(changes)

    async def _take_all(self, reading: files.Reading, holds: Holds) -> Changes:
        """Raises ConfigErrors of the workers; the rest is taken then."""
        self.holds = holds
        self._take_rules(reading, holds)
        self.access = replace(self.access, **reading.access)
        self.lacks_slots = False
        workers = reading.workers if holds.workers is None else holds.workers.workers
        self.is_workers_file_bad = workers is None
        if workers is None:
            return Changes()
        changes = await self._declare(workers)
        self._has_read_workers = True
        return changes

    def _take_rules(self, reading: files.Reading, holds: Holds) -> None:
        held = None if holds.profiles is None else holds.profiles.rules
        if held is not None:
            self.rules, self._profile_warnings = held, ()
        elif reading.profiles is not None:
            self.rules, self._profile_warnings = rules_of(reading.profiles), reading.profiles.warnings
        else:
            return
        self._has_read_profiles = True

    async def _take_back(self, before: _InForce) -> None:
        """After something that is not to be held."""
        self.rules, self.access, self.holds = before.rules, before.access, before.holds
        with suppress(RequestError):  # it is logged, and at worst what is not held is held again after a restart
            await self._save_holds(before.holds)
        try:
            changes = await self._declare(before.workers)
        except ConfigErrors as error:  # their slots are still in use: the next reload declares them again
            log("workers_not_taken_back", level="error", reason=str(error))
            return
        with suppress(NotPublished):  # tried again by the publisher
            await self._settle(changes)

    async def _keep_holds(self) -> None:
        if self.holds != self._saved_holds:
            with suppress(RequestError):  # a file that changed is seen to have changed after a restart, too
                await self._save_holds(self.holds)

    async def _save_holds(self, holds: Holds) -> None:
        """Raises RequestError 500: then they are not kept."""
        try:
            await asyncio.to_thread(self._state.save_holds, holds)
        except OSError as error:
            log("holds_not_saved", level="error", directory=self._settings.state_dir, reason=error.strerror)
            message = f"the state directory {self._settings.state_dir} cannot be written: {error.strerror}"
            raise RequestError(500, "STATE_NOT_SAVED", message, fault=Fault.OPERATOR, type="server_error") from None
        self._saved_holds = holds

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
        held = [kind for kind in KINDS if self.holds.of(kind) is not None]
        log("config_read", ok=self.is_ok, pending_restart=self.pending_restart, held=held)


def _place(error: ConfigError) -> str:
    return ":".join(map(str, (error.source, error.line, error.column))) if error.line else error.source
