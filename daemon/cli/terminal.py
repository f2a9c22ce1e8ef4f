"""Text for people: tables, colours where they are wanted, durations."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Literal

Colour = Literal["red", "green", "yellow", "bold"]

_CODES: dict[Colour, str] = {"red": "31", "green": "32", "yellow": "33", "bold": "1"}
_GAP = "  "
_LEAST_WIDTH = 6


def paint(text: str, colour: Colour) -> str:
    is_wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{_CODES[colour]}m{text}\033[0m" if is_wanted else text


def plain(value: object) -> str:
    """One line without control characters: what a worker answered may be in it."""
    return "".join(char if char.isprintable() else "�" for char in str(value))


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Columns as wide as they need; in a terminal that is too narrow the widest ones give way.

    `width`: columns to fit in; default: the terminal's, no limit where there is none. 0 = no limit.
    """
    cells = [list(heads), *([plain(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    _shrink(widths, _terminal_width() if width is None else width)
    return "\n".join(_line(row, widths) for row in cells)


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def _shrink(widths: list[int], limit: int) -> None:
    gaps = len(_GAP) * (len(widths) - 1)
    while limit and sum(widths) + gaps > limit and max(widths) > _LEAST_WIDTH:
        widths[widths.index(max(widths))] -= 1


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    fitted = (_fit(cell, width) for cell, width in zip(cells, widths, strict=True))
    return _GAP.join(fitted).rstrip()


def _fit(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"


def progress_bar(share: float, width: int = 20) -> str:
    """`share`: 0 … 1; never shown as full before it is."""
    share = min(1.0, max(0.0, share))
    filled = int(share * width)
    return f"{'█' * filled}{'░' * (width - filled)} {int(share * 100):3d} %"


def duration(seconds: float) -> str:
    """The two units that matter: 12 s, 3 min 5 s, 2 h 10 min, 4 d 3 h."""
    whole = max(0, int(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    first = next((index for index, (size, _) in enumerate(units) if whole >= size), 3)
    parts: list[str] = []
    for size, name in units[first : first + 2]:
        count, whole = divmod(whole, size)
        if count or not parts:
            parts.append(f"{count} {name}")
    return " ".join(parts)


def size(count_bytes: int) -> str:
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
