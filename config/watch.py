"""Tells when one of a few files changed: rewritten, renamed over, created, deleted, or behind a swapped symlink.

Editors and deployment tools replace files, so directories are watched, not files: for every path the directory of the
file and of each symlink on the way to it. What changed is decided by comparing fingerprints (who is there, since
when, how large), never by the events alone: events only say when to look, and are merely trusted to name a file that
was rewritten within the resolution of its time stamps. A slow poll looks regardless, so that a watch that broke (a
directory made anew, a network file system, no inotify watches left) costs seconds and not the change.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

QUIET_MS = 50
"""a change is reported once nothing has happened for this long,"""
MAX_DELAY_MS = 250
"""or after this long at the latest"""
POLL_S = 5.0
MAX_LINKS = 40
"""as many symlinks as the kernel follows"""

Fingerprint = tuple[tuple[int, ...] | None, ...]


async def watch(
    paths: Sequence[Path], stop: asyncio.Event, *, poll_s: float = POLL_S
) -> AsyncIterator[frozenset[Path]]:
    """Yields which of `paths` changed since the call or the last yield, until `stop` is set.

    The first comparison is against what is there when the iteration begins; a file may be missing then.
    """
    files = _Files(paths)
    while not stop.is_set():
        watched = files.directories()
        with _arm(watched) as notify:
            # What happened before the watch was armed made no event.
            if changed := files.changed(()):
                yield changed
            while not stop.is_set() and files.directories() == watched:
                if changed := files.changed(await _next_events(notify, stop, poll_s)):
                    yield changed


class _Files:
    def __init__(self, paths: Sequence[Path]) -> None:
        self._absolute = {path: path.absolute() for path in paths}
        self._last = {path: _fingerprint(absolute) for path, absolute in self._absolute.items()}

    def directories(self) -> dict[str, tuple[int, int]]:
        """Every directory to watch, with its identity: one made anew at the same place is another one."""
        parents = {_existing(step.parent) for path in self._absolute.values() for step in links(path)}
        found: dict[str, tuple[int, int]] = {}
        for parent in parents:
            with contextlib.suppress(OSError):
                status = parent.stat()
                found[str(parent)] = (status.st_dev, status.st_ino)
        return found

    def changed(self, events: Iterable[str]) -> frozenset[Path]:
        touched = set(events)
        changed = set()
        for path, absolute in self._absolute.items():
            now = _fingerprint(absolute)
            if now != self._last[path] or any(str(step) in touched for step in links(absolute)):
                changed.add(path)
            self._last[path] = now
        return frozenset(changed)


def links(path: Path) -> list[Path]:
    """Every symlink met on the way along an absolute path, and what is at the end of it (which need not exist)."""
    found: list[Path] = []
    current = Path("/")
    ahead = list(reversed(path.parts[1:]))
    while ahead:
        part = ahead.pop()
        if part == "..":
            current = current.parent
            continue
        step = current / part
        try:
            target = step.readlink()
        except OSError:
            current = step
            continue
        found.append(step)
        if len(found) > MAX_LINKS:
            break
        if target.is_absolute():
            current = Path("/")
        ahead.extend(part for part in reversed(target.parts) if part != "/")
    return [*found, current]


def _fingerprint(path: Path) -> Fingerprint:
    return tuple(_identity(step) for step in links(path))


def _identity(step: Path) -> tuple[int, ...] | None:
    try:
        status = step.lstat()
    except OSError:
        return None
    # Times of the change as well: a write within the clock's tick or a restored mtime still moves it.
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above that is there, to see it made."""
    while not directory.is_dir() and directory != directory.parent:
        directory = directory.parent
    return directory


def _arm(directories: Iterable[str]) -> contextlib.AbstractContextManager[RustNotify | None]:
    try:
        return RustNotify(list(directories), False, False, 0, False, True)
    except (OSError, WatchfilesRustInternalError):  # no watches left, or gone again: the slow poll remains
        return contextlib.nullcontext()


async def _next_events(notify: RustNotify | None, stop: asyncio.Event, poll_s: float) -> set[str]:
    """Paths named by events; empty when the time for a slow poll has come, or on `stop`."""
    if notify is None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), poll_s)
        return set()
    halt = _Halt(stop)
    timeout_ms = int(poll_s * 1000)
    call = asyncio.get_running_loop().run_in_executor(None, notify.watch, MAX_DELAY_MS, QUIET_MS, timeout_ms, halt)
    try:
        events = await asyncio.shield(call)
    except asyncio.CancelledError:
        # The thread must be out of the watch before the watch is closed; it looks every QUIET_MS.
        halt.is_cancelled = True
        await asyncio.wait([call])
        raise
    except WatchfilesRustInternalError:
        await asyncio.sleep(QUIET_MS / 1000)
        return set()
    return {name for _kind, name in events} if isinstance(events, set) else set()


class _Halt:
    """What the watching thread asks; set by us, or with the caller's event."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self.is_cancelled = False

    def is_set(self) -> bool:
        return self.is_cancelled or self._stop.is_set()
