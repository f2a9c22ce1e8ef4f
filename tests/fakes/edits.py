"""The ways in which editors and deployment tools save a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

_numbers = count()

Edit = Callable[[Path, bytes], None]


def write_and_rename(path: Path, content: bytes) -> None:
    """Write aside, rename over: most tools that care."""
    aside = path.with_name(f".{path.name}.{next(_numbers)}")
    aside.write_bytes(content)
    aside.replace(path)


def truncate_and_write(path: Path, content: bytes) -> None:
    """In place: nano, shell redirection. The file is empty, then half there, for a moment."""
    with path.open("wb") as file:
        file.flush()
        file.write(content[: len(content) // 2])
        file.flush()
        file.write(content[len(content) // 2 :])


def swap_symlink(path: Path, content: bytes) -> None:
    """A new version beside the old one, the link moved to it: configuration management."""
    version = path.with_name(f"{path.stem}-{next(_numbers)}{path.suffix}")
    version.write_bytes(content)
    link = path.with_name(f".link.{next(_numbers)}")
    link.symlink_to(version.name)
    link.replace(path)


def back_up_and_write(path: Path, content: bytes) -> None:
    """The old one becomes the backup, a new one is made: vim's backupcopy=no. There is no file for a moment."""
    os.replace(path, path.with_name(f"{path.name}~"))  # noqa: PTH105 - a link is moved as the link that it is
    path.write_bytes(content)


def delete_and_write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


EDITS: tuple[Edit, ...] = (
    write_and_rename,
    truncate_and_write,
    swap_symlink,
    back_up_and_write,
    delete_and_write,
)
