"""How a process of ours starts another Python like itself."""

from __future__ import annotations

import sys


def interpreter_flags() -> list[str]:
    """This process' own flags, and -P at least: `-m` would put the working directory first on the module path."""
    flags = ["-I"] if sys.flags.isolated else ["-P"]
    flags += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        flags += ["-X", name if value is True else f"{name}={value}"]
    return flags
