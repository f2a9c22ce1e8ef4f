"""What is logged, in the header of the segment: written by control, in force in all processes from the next line on.

It outlives every process but not the daemon: a restart goes back to the settings.
"""

from __future__ import annotations

from typing import Literal

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

Level = Literal["debug", "info", "warning", "error"]

LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")


class LogSettings:
    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._cells = segment.cells
        self._reals = segment.reals

    def current_level(self) -> Level:
        """Lines below it are not written; "info" while nobody has said anything."""
        return LEVELS[self._cells[at.H_LOG_LEVEL] - 1] if self._cells[at.H_LOG_LEVEL] else "info"

    @property
    def access_sample(self) -> float:
        """The share of the requests without an error that get an access line."""
        return round(1.0 - self._reals[at.H_ACCESS_UNSAMPLED], 9)  # 0.1, not 0.09999999999999998

    def put(self, level: str, access_sample: float) -> None:
        self._segment.words.put(at.H_LOG_LEVEL, LEVELS.index(level) + 1)
        self._reals[at.H_ACCESS_UNSAMPLED] = 1.0 - access_sample
