"""A file that is replaced as a whole or not at all: written aside, fsync, rename, fsync of the directory."""

from __future__ import annotations

import os
from pathlib import Path


class Replacement:
    """What is to become `path`, readable by its owner only. Blocks on the disk; every method may raise OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_suffix(".tmp")
        self._file = open(self._open(), "wb")  # noqa: SIM115 - `commit` or `discard` closes it
        self.size_bytes = 0

    def _open(self) -> int:
        fd = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)  # it may have been left behind by somebody else
        return fd

    def write(self, data: bytes) -> None:
        self.size_bytes += self._file.write(data)

    def commit(self) -> None:
        """On the disk, under its name, when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def discard(self) -> None:
        """Leaves the old file as it was, also after a `commit` that failed."""
        self._file.raw.close()  # what is buffered may be what the disk had no room for
        self._aside.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Raises OSError; the old file is then still whole."""
    file = Replacement(path)
    try:
        file.write(data)
        file.commit()
    except BaseException:
        file.discard()
        raise
