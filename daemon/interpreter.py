"""How a process of ours starts another Python like itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def interpreter_flags() -> list[str]:
    """This process' own flags, and -P at least: `-m` would put the working directory first on the module path."""
    flags = ["-I"] if sys.flags.isolated else ["-P"]
    flags += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        flags += ["-X", name if value is True else f"{name}={value}"]
    return flags


def own_command() -> list[str]:
    """How this process was started, in words that start whatever is installed under that name by then.

    A script is named itself, not the interpreter that its first line named at the time: a new installation may have
    another one.
    """
    script = Path(sys.argv[0]).absolute()
    is_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    if not is_module and os.access(script, os.X_OK) and script.read_bytes()[:2] == b"#!":
        return [str(script), *sys.argv[1:]]
    return [sys.executable, *sys.orig_argv[1:]]
