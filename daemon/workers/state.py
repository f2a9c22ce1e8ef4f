"""What survives a restart: workers that were added by the admin API, with their keys, and drains of any worker.

One file, replaced as a whole, readable by its owner only. A lock on the directory keeps a second daemon away; it is
the kernel's (flock), so a killed process leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec

from pointsman.config.load import DeclaredWorker
from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.atomic_file import replace_file
from pointsman.daemon.workers.registry import Drain

FILE_NAME = "workers.state.json"
LOCK_NAME = "lock"
VERSION = 1
LOCK_WAIT_S = 2.0
_LOCK_PAUSE_S = 0.05


def move_aside(path: Path, reason: str) -> None:
    """A file that cannot be understood is kept, and in nobody's way."""
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(aside)
    log("state_corrupt", level="error", file=str(path), moved_to=str(aside), reason=reason)


class StateError(PointsmanError):
    """The state directory cannot be used; the message says why."""


class StoredWorker(msgspec.Struct, frozen=True):
    id: str
    address: str | None
    """Where it was when it was added; used again when its name does not resolve after a restart."""
    worker: DeclaredWorker


class Stored(msgspec.Struct, frozen=True):
    version: int
    workers: tuple[StoredWorker, ...]
    drains: dict[str, Drain] = {}
    """by URL"""


NOTHING = Stored(VERSION, ())


class WorkerState:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / FILE_NAME
        self._lock_fd = -1

    def lock(self, wait_s: float = LOCK_WAIT_S) -> None:
        """Blocks up to `wait_s`: a predecessor that was killed a moment ago may still be dying. Raises StateError."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"state directory {self.directory} cannot be used: {error.strerror}") from None
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    message = f"state directory {self.directory} is in use by another daemon (see --state-dir)"
                    raise StateError(message) from None
                time.sleep(_LOCK_PAUSE_S)
            else:
                self._lock_fd = fd
                return

    def unlock(self) -> None:
        """Another process may write from now on."""
        os.close(self._lock_fd)
        self._lock_fd = -1

    @property
    def is_locked(self) -> bool:
        """Whether the directory is ours to write to."""
        return self._lock_fd >= 0

    def load(self) -> Stored:
        """A file that cannot be understood is moved aside, never in the way of a start. Raises StateError.

        Without the lock it is somebody else's file: it is left alone, and the error says what is wrong with it.
        """
        try:
            state = msgspec.json.decode(self.path.read_bytes(), type=Stored)
        except FileNotFoundError:
            return NOTHING
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._move_aside(str(error))
            return NOTHING
        except OSError as error:
            raise StateError(f"{self.path} cannot be read: {error.strerror}") from None
        if state.version != VERSION:
            self._move_aside(f"version {state.version}, expected {VERSION}")
            return NOTHING
        return state

    def save(self, stored: Stored) -> None:
        """Blocks until the disk has it. Raises OSError; the old file is then still whole."""
        data = msgspec.json.format(msgspec.json.encode(stored), indent=2) + b"\n"
        replace_file(self.path, data)

    def _move_aside(self, reason: str) -> None:
        if not self.is_locked:
            raise StateError(f"{self.path} cannot be read by this version: {reason}")
        move_aside(self.path, reason)
