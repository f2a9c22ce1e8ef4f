"""What the state directory has of the configuration: its history, and what is held in the files' place.

Both files are readable by the daemon alone. The history has no secret in it; what is held has the workers' keys as the
workers file does, because it must be in force again after a restart, and it is gone when the hold ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from pointsman.daemon.control.history import VERSION as HISTORY_VERSION
from pointsman.daemon.control.history import Stored
from pointsman.daemon.control.holds import NOTHING_HELD, Holds
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.atomic_file import replace_file
from pointsman.daemon.workers.state import WorkerState, move_aside

HISTORY_NAME = "config.history.json"
HELD_NAME = "config.held.json"
HELD_VERSION = 1

T = TypeVar("T")


class _StoredHolds(msgspec.Struct, frozen=True):
    version: int
    holds: Holds


class ConfigState:
    """Blocks on the disk; writes only while the directory is locked by us."""

    def __init__(self, directory: WorkerState) -> None:
        self._directory = directory
        self._history = directory.directory / HISTORY_NAME
        self._held = directory.directory / HELD_NAME

    def load_history(self) -> Stored | None:
        """None: there is none, or none that can be understood."""
        stored = self._load(self._history, Stored)
        if stored is not None and stored.version != HISTORY_VERSION:
            self._refuse(self._history, f"version {stored.version}, expected {HISTORY_VERSION}")
            return None
        return stored

    def save_history(self, stored: Stored) -> None:
        """Raises OSError."""
        self._save(self._history, msgspec.json.encode(stored))

    def load_holds(self) -> Holds:
        stored = self._load(self._held, _StoredHolds)
        if stored is None:
            return NOTHING_HELD
        if stored.version != HELD_VERSION:
            self._refuse(self._held, f"version {stored.version}, expected {HELD_VERSION}")
            return NOTHING_HELD
        return stored.holds

    def save_holds(self, holds: Holds) -> None:
        """Raises OSError; what was held before is then still there."""
        if holds != NOTHING_HELD:
            self._save(self._held, msgspec.json.encode(_StoredHolds(HELD_VERSION, holds)))
        elif self._directory.is_locked:
            self._held.unlink(missing_ok=True)

    def _save(self, path: Path, data: bytes) -> None:
        if self._directory.is_locked:
            replace_file(path, data)

    def _load(self, path: Path, kind: type[T]) -> T | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._refuse(path, str(error))
            return None

    def _refuse(self, path: Path, reason: str) -> None:
        """Never in the way of a start."""
        if self._directory.is_locked and path.is_file():
            move_aside(path, reason)
        else:
            log("state_unreadable", level="error", file=str(path), reason=reason)
