"""The history of the configuration, and what goes back in it: rollback, apply, confirm, release; the trial's deadline.

Everything that changes something goes through the reloader, so edits of files, rollbacks and deadlines take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from msgspec.structs import replace

from pointsman.admin_api.ports import (
    ApplyRequest,
    ConfigDiffView,
    DifferenceView,
    GenerationView,
    HeldView,
    HistoryEntryView,
    HistoryView,
)
from pointsman.config import documents
from pointsman.config.load import DeclaredWorker
from pointsman.config.profiles_file import read_profiles
from pointsman.config.snapshot import Snapshot
from pointsman.config.workers_file import read_workers
from pointsman.daemon.control.config_state import ConfigState
from pointsman.daemon.control.desired import Rules, rules_of
from pointsman.daemon.control.files import Reading
from pointsman.daemon.control.history import (
    Content,
    Entry,
    History,
    Unreadable,
    content_in,
    differences,
    shown,
)
from pointsman.daemon.control.holds import KINDS, NOTHING_HELD, Held, Holds
from pointsman.daemon.control.reload import Reloader
from pointsman.daemon.errors import ConfigErrors, Fault, RequestError
from pointsman.daemon.routing.checking import FileCheck
from pointsman.daemon.telemetry.logs import log

RETRY_S = 1.0
LOOK_S = 2.0
"""between looks at the wall clock while something is on trial"""
MAX_NAME_CHARS = 200


class Historian:
    def __init__(
        self,
        reloader: Reloader,
        state: ConfigState,
        files: Mapping[str, str | None],
        now: Callable[[], float] = time.time,
    ) -> None:
        """`files`: paths by kind. `now` is the wall clock: deadlines outlive processes."""
        self._reloader = reloader
        self._state = state
        self._files = files
        self._now = now
        self._history = History(None)
        self._saved = self._history.stored()
        self._news = asyncio.Event()
        self._disk = asyncio.Lock()

    # --- the publisher

    async def load(self) -> int:
        """Before anything is published; returns the last generation that the history knows of."""
        self._history = History(await asyncio.to_thread(self._state.load_history))
        self._saved = self._history.stored()
        return self._history.reached

    def expect(self) -> str:
        """The name of what the files say now, for the snapshot that is compiled."""
        content = self._reloader.content
        return "" if content is None else self._history.expect(content, self._reloader.cause, self._reloader.by)

    def published(self, snapshot: Snapshot) -> None:
        if self._history.published(snapshot.generation, snapshot.content, self._now()):
            self._news.set()

    # --- looking

    def history(self) -> HistoryView:
        entries = self._history.entries
        views = [self._view(index) for index in reversed(range(len(entries)))]
        return HistoryView(generations=tuple(views))

    def generation(self, number: int) -> GenerationView:
        entry = self._find(number)
        view = self._view(self._history.entries.index(entry))
        return GenerationView(
            generation=view.generation,
            last=view.last,
            at=view.at,
            cause=view.cause,
            by=view.by,
            is_current=view.is_current,
            content=shown(_content(entry, number)),
        )

    def diff(self, before: int, after: int | None) -> ConfigDiffView:
        last = self._history.reached if after is None else after
        one, other = self._find(before), self._find(last)
        changes = differences(shown(_content(one, before)), shown(_content(other, last)))
        return ConfigDiffView(
            before=before,
            after=last,
            changes=tuple(DifferenceView(path=at.path, before=at.before, after=at.after) for at in changes),
        )

    def held(self) -> tuple[HeldView, ...]:
        holds = self._reloader.holds
        return tuple(
            HeldView(
                kind=kind,
                path=self._files[kind],
                origin=held.origin,
                what=held.what,
                by=held.by,
                since=held.since,
                confirm_by=holds.trial.deadline if holds.trial is not None and holds.trial.kind == kind else None,
            )
            for kind in KINDS
            if (held := holds.of(kind)) is not None
        )

    def _view(self, index: int) -> HistoryEntryView:
        entries = self._history.entries
        entry, is_last = entries[index], index == len(entries) - 1
        return HistoryEntryView(
            generation=entry.generation,
            last=self._history.reached if is_last else entries[index + 1].generation - 1,
            at=entry.at,
            cause=entry.cause,
            by=entry.by,
            is_current=is_last,
        )

    def _find(self, number: int) -> Entry:
        entry = self._history.find(number)
        if entry is not None:
            return entry
        entries = self._history.entries
        kept = f"generations {entries[0].generation} to {self._history.reached} are" if entries else "none is"
        raise _error(404, "GENERATION_NOT_KEPT", f"generation {number} is not in the history; {kept}")

    # --- changing

    async def rollback(self, number: int, by: str) -> None:
        """Raises RequestError."""
        content = self._revealed(number)

        def change(_: Holds, reading: Reading) -> Holds:
            says_profiles = reading.profiles is not None and rules_of(reading.profiles) == content.rules
            says_workers = reading.workers is not None and _unplaced(reading.workers) == content.workers
            held = Held("rollback", f"generation {number}", by, self._now(), "")
            return Holds(
                None if says_profiles else replace(held, hides=reading.digests["profiles"], rules=content.rules),
                None if says_workers else replace(held, hides=reading.digests["workers"], workers=content.workers),
            )

        await self._hold(change, f"rollback to {number}", by)

    async def apply(self, request: ApplyRequest, by: str) -> None:
        """Raises RequestError."""
        rules, workers = await asyncio.to_thread(_read, request)
        now, name = self._now(), request.name[:MAX_NAME_CHARS]
        deadline = None if request.confirm_within_s is None else now + request.confirm_within_s

        def change(holds: Holds, reading: Reading) -> Holds:
            if holds.trial is not None:
                message = f"what was applied to {holds.trial.kind} waits for its confirmation: confirm or release it"
                raise _error(409, "CONFIRMATION_PENDING", message)
            held = Held("apply", name, by, now, reading.digests[request.kind], rules, workers)
            return holds.applied(request.kind, held, deadline)

        await self._hold(change, f"apply {name}", by)

    async def confirm(self, by: str) -> None:
        """Raises RequestError."""

        def change(holds: Holds, _: Reading) -> Holds:
            if holds.at(self._now()).trial is None:
                raise _error(409, "NOTHING_TO_CONFIRM", "nothing that was applied waits for a confirmation")
            return holds.confirmed()

        await self._hold(change, "confirm", by)

    async def release(self, by: str) -> None:
        """Raises RequestError."""

        def change(holds: Holds, _: Reading) -> Holds:
            if holds == NOTHING_HELD:
                raise _error(409, "NOTHING_HELD", "the files are in force already")
            return NOTHING_HELD

        await self._hold(change, "release", by)

    async def _hold(self, change: Callable[[Holds, Reading], Holds], cause: str, by: str) -> None:
        """The history has it on the disk, too, when this returns."""
        try:
            await self._reloader.hold(change, cause, by)
        finally:
            self._news.set()  # there may be another deadline
        await self.flush()
        log("config_held", cause=cause, by=by, held=[kind for kind in KINDS if self._reloader.holds.of(kind)])

    def _revealed(self, number: int) -> Content:
        """Raises RequestError."""
        try:
            return self._history.mask.revealed(_content(self._find(number), number))
        except KeyError as error:
            message = (
                f"generation {number} needs {error.args[0]}, and the history keeps secrets as hashes only; "
                "it is in no file any more, so put it back there instead"
            )
            raise _error(409, "SECRET_NOT_KEPT", message) from None

    # --- background

    async def run(self) -> None:
        """Writes the history down, and takes back what is not confirmed in time. Until it is cancelled."""
        while True:
            await self.flush()
            trial = self._reloader.holds.trial
            left_s = None if trial is None else max(trial.deadline - self._now(), 0.0)
            if left_s == 0.0:
                await self._revert()
                continue
            with suppress(TimeoutError):  # a wall clock may be set meanwhile, so it is looked at again and again
                await asyncio.wait_for(self._news.wait(), None if left_s is None else min(left_s, LOOK_S))
            self._news.clear()

    async def flush(self) -> None:
        """The history is on the disk when this returns, if the disk takes it."""
        async with self._disk:
            stored = self._history.stored()
            if stored == self._saved:
                return
            try:
                await asyncio.to_thread(self._state.save_history, stored)
            except OSError as error:
                log("history_not_saved", level="error", reason=error.strerror)
            self._saved = stored

    async def _revert(self) -> None:
        try:
            await self._hold(lambda holds, _: holds.at(self._now()), "not confirmed", "")
        except RequestError as error:
            log("config_not_reverted", level="error", reason=error.message)
            await asyncio.sleep(RETRY_S)
        else:
            log("config_reverted", level="warning", reason="not confirmed in time")


def _read(request: ApplyRequest) -> tuple[Rules | None, tuple[DeclaredWorker, ...] | None]:
    """Raises RequestError 422."""
    try:
        document = documents.parse(request.content.encode("utf-8", "surrogateescape"), request.name)
        if request.kind == "profiles":
            return rules_of(read_profiles(document, FileCheck())), None
        return None, read_workers(document)
    except ConfigErrors as error:
        raise _error(422, "CONFIG_REFUSED", str(error)) from None


def _unplaced(workers: Sequence[DeclaredWorker]) -> tuple[DeclaredWorker, ...]:
    return tuple(replace(worker, line=0) for worker in workers)


def _content(entry: Entry, number: int) -> Content:
    """Masked. Raises RequestError 409."""
    try:
        return content_in(entry)
    except Unreadable as error:
        message = f"generation {number} was written by another version of pointsman: {error}"
        raise _error(409, "WRITTEN_BY_ANOTHER_VERSION", message) from None


def _error(status: int, code: str, message: str) -> RequestError:
    return RequestError(status, code, message, fault=Fault.OPERATOR)
