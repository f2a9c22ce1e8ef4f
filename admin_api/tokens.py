"""The admin tokens: where they come from, how they are kept and compared.

A token file is one of two kinds. With the ending .json, .yaml or .toml it names its tokens, each by its hash and with a
scope (`config.tokens_file`). Any other has one token per line, in clear, each with the scope admin and called by its
line; blank lines and lines that begin with # do not count.

It is read again when it changes. A file that cannot be read, or has no token in it, lets nobody in (deleting a token
must work); the unix socket stays open to mend that. A file of names with a defect in it changes nothing, and the log
says where.

Only SHA-256 digests are kept: tokens are random, so nothing slower is needed, and a dump of the process shows none.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pointsman.admin_api.callers import Caller, Scope
from pointsman.config import documents, places
from pointsman.config.keys_file import digest_of
from pointsman.config.settings import Settings
from pointsman.config.tokens_file import read_tokens
from pointsman.daemon.errors import ConfigError, ConfigErrors
from pointsman.daemon.telemetry.logs import log

CREDENTIAL = "admin-token"
"""name in $CREDENTIALS_DIRECTORY (systemd: LoadCredential=admin-token:…)"""
GENERATED_MODE = 0o640
MAX_FILE_BYTES = 1 << 20

_Stamp = tuple[int, int, int]


class _Token(NamedTuple):
    digest: bytes
    caller: Caller


class TokenStore:
    """The tokens of one file; `is_generated` means that we made it, and make it again when it is gone."""

    def __init__(self, path: Path, *, is_generated: bool = False) -> None:
        """Raises ConfigErrors when there is no usable token to begin with."""
        self.path = path
        self._is_generated = is_generated
        self._stamp: _Stamp | None = None
        self._tokens: tuple[_Token, ...] = ()
        try:
            self._load()
        except OSError as error:
            raise _unusable(path, f"cannot be used: {error.strerror}") from None
        if not self._tokens:
            raise _unusable(path, "has no token in it")

    def find(self, token: str) -> Caller | None:
        """Takes the same time whichever token it is, or nearly is."""
        self._refresh()
        digest = digest_of(token)
        matches = [known.caller for known in self._tokens if hmac.compare_digest(digest, known.digest)]
        return matches[0] if matches else None

    def _refresh(self) -> None:
        try:
            if self._stamp is None or self._stamp != self._current_stamp():
                self._load()
        except OSError as error:
            if self._tokens or self._stamp is not None:
                log("admin_tokens_unreadable", level="error", path=str(self.path), reason=error.strerror)
            self._tokens, self._stamp = (), None
        except ConfigErrors as error:
            log("admin_tokens_refused", level="error", path=str(self.path), problem=str(error))

    def _current_stamp(self) -> _Stamp | None:
        try:
            return _stamp(self.path.stat())
        except FileNotFoundError:
            return None

    def _load(self) -> None:
        if self._is_generated:
            _ensure(self.path)
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES)
        self._stamp = _stamp(status)
        self._tokens = _named(data, self.path) if _has_names(self.path) else _listed(data)
        if not self._tokens:
            log("admin_tokens_empty", level="error", path=str(self.path))
        if status.st_mode & stat.S_IROTH:
            log("admin_tokens_exposed", level="warning", path=str(self.path), remedy=f"chmod o-rwx {self.path}")


def open_tokens(settings: Settings, environ: Mapping[str, str] = os.environ) -> TokenStore:
    """The configured file, else systemd's credential, else one that is generated in the runtime directory.

    Raises ConfigErrors.
    """
    if settings.admin_token_file:
        return TokenStore(Path(settings.admin_token_file))
    credential = Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / CREDENTIAL
    if credential.exists():
        return TokenStore(credential)
    return TokenStore(Path(settings.runtime_dir) / places.ADMIN_TOKEN, is_generated=True)


def _has_names(path: Path) -> bool:
    return path.suffix.lower() in documents.FORMATS


def _named(data: bytes, path: Path) -> tuple[_Token, ...]:
    """Raises ConfigErrors."""
    found = read_tokens(documents.parse(data, str(path)))
    return tuple(_Token(token.digest, Caller(token.name, Scope[token.scope.upper()])) for token in found)


def _listed(data: bytes) -> tuple[_Token, ...]:
    lines = enumerate((line.strip() for line in data.decode("utf-8", "replace").splitlines()), 1)
    return tuple(
        _Token(digest_of(line), Caller(f"line {number}", Scope.ADMIN))
        for number, line in lines
        if line and not line.startswith("#")
    )


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _unusable(path: Path, problem: str) -> ConfigErrors:
    return ConfigErrors([ConfigError(str(path), problem, key="admin_token_file")])


# --- a token of our own


def _ensure(path: Path) -> None:
    """Keep what is there if it is ours alone: people and scripts have it, and control may restart at any time."""
    if not _is_ours(path):
        _generate(path)


def _is_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    exposed = status.st_mode & (stat.S_IRWXO | stat.S_IWGRP)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_size > 0 and not exposed


def _generate(path: Path) -> None:
    """Appears whole or not at all; another user's file of that name is replaced, not written into."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
        os.fchmod(fd, GENERATED_MODE)
    draft.rename(path)
