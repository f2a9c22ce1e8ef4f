"""Did you mean …? Light: the command line asks it too."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or nothing; case and `-`/`_` do not count as differences."""
    names = {_fold(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_fold(name), names, n=1, cutoff=0.6)
    return f"did you mean {names[found[0]]!r}?" if found else ""


def _fold(name: str) -> str:
    return name.replace("-", "_").casefold()
