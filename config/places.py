"""Where the daemon keeps its files, and where a client looks for its admin socket. Imports nothing heavy."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from pointsman.daemon.errors import ConfigError, ConfigErrors

ADMIN_SOCKET = "admin.sock"
ADMIN_TOKEN = "admin-token"
BATCH_SOCKET = "batch.sock"
"""where the batch runner answers the shards and the operator"""
FANOUT_SOCKET = "fan-outs.sock"
"""where control answers what came in on the data port; for the shards alone"""
BATCH_DIR = "batches"
"""in the state directory"""
SYSTEM_RUNTIME_DIR = Path("/run/pointsman")
"""What RuntimeDirectory=pointsman of the systemd unit makes; the service sees it as $RUNTIME_DIRECTORY."""


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Sockets and the generated token. Looked up, not made."""
    if given := _first(environ.get("RUNTIME_DIRECTORY")):
        return given
    if session := _first(environ.get("XDG_RUNTIME_DIR")):
        return session / "pointsman"
    return shared_temp_dir(environ)


def shared_temp_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Per user; its parent is writable for everybody, so whoever uses it checks it first (`prepare`)."""
    return Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"pointsman-{os.getuid()}"


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """What survives a restart. Looked up, not made."""
    if given := _first(environ.get("STATE_DIRECTORY")):
        return given
    base = _first(environ.get("XDG_STATE_HOME")) or Path.home() / ".local" / "state"
    return base / "pointsman"


def admin_sockets(environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Where a client finds the daemon's socket, most likely first: this user's daemon, then the system's."""
    return tuple(dict.fromkeys((runtime_dir(environ) / ADMIN_SOCKET, SYSTEM_RUNTIME_DIR / ADMIN_SOCKET)))


def batch_store(url: str | None, state_dir: str) -> str | None:
    """`sqlite` alone means a file in the state directory."""
    return f"sqlite:{quote(state_dir)}/{BATCH_DIR}/payloads.db" if url == "sqlite" else url


def prepare(path: Path, key: str) -> None:
    """Makes the directory (0700) where it is missing. Raises ConfigErrors when it is not safe to keep files in.

    systemd's directories may be links (DynamicUser) and open to a group, so that is allowed; in a parent that
    everybody may write, somebody else could have made it first, so there nothing but our own 0700 directory will do.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat() if _is_shared(path.parent) else path.stat()
    except OSError as error:
        raise _refused(path, key, f"cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(path, key, "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not a directory")
    if status.st_uid != os.geteuid() and (_is_shared(path.parent) or status.st_uid != 0):
        raise _refused(path, key, f"belongs to another user (uid {status.st_uid})")
    forbidden = 0o077 if _is_shared(path.parent) else 0o002
    if status.st_mode & forbidden:
        raise _refused(path, key, f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})")
    if not os.access(path, os.W_OK | os.X_OK):
        raise _refused(path, key, "is not writable")


def _is_shared(parent: Path) -> bool:
    return bool(parent.stat().st_mode & stat.S_IWOTH)


def _refused(path: Path, key: str, problem: str) -> ConfigErrors:
    return ConfigErrors([ConfigError(str(path), problem, key=key)])


def _first(value: str | None) -> Path | None:
    """systemd lists several directories with colons; XDG says that relative paths are to be ignored."""
    path = (value or "").split(":")[0]
    return Path(path) if path.startswith("/") else None
