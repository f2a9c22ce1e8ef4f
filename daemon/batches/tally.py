"""What this process counts: in shared memory, where control reads it for /metrics; a shell keeps it to itself."""

from __future__ import annotations

from array import array

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.failure_counts import FailureCounts
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.stores.counters import Totals
from pointsman.daemon.stores.results import MISSING, code_of


class Tally:
    def __init__(self, segment: Segment | None = None) -> None:
        """Counters of a runner before this one are gone on with; gauges begin at 0."""
        if segment is None:
            self._cells: memoryview = memoryview(array("q", bytes(8 * at.BATCH_WORDS)))
        else:
            self._cells = segment.cells[segment.layout.batch_counts : segment.layout.batch_counts + at.BATCH_WORDS]
        self._failures = FailureCounts(self._cells[at.B_FAILURES :])
        self._cells[: at.B_FIRST_COUNTER] = memoryview(array("q", bytes(8 * at.B_FIRST_COUNTER)))

    def done(self, *, has_succeeded: bool) -> None:
        self._cells[at.B_SUCCEEDED if has_succeeded else at.B_FAILED] += 1

    def unrun(self, lines: int) -> None:
        """Of batches that were cancelled, or whose window was over."""
        self._cells[at.B_UNRUN] += lines

    def lost(self, lines: int) -> None:
        """Results that the store had and lost."""
        self._cells[at.B_LOST] += lines

    def retried(self) -> None:
        self._cells[at.B_RETRIES] += 1

    def transferred(self, news: Totals) -> None:
        """By a payload store since the last time. That a key is missing is an answer, no failure."""
        self._cells[at.B_KEYS_RETRIED] += news.retried
        self._cells[at.B_KEYS_RECOVERED] += news.recovered
        self._cells[at.B_KEYS_EXHAUSTED] += news.exhausted
        for (_, code), count in news.failures.items():
            if code != code_of(MISSING):
                self._failures.add(str(code), count)

    def show(self, *, batches: int, in_flight: int, limit: int, is_paused: bool) -> None:
        """Gauges: running batches, requests at the data port, how many may be, whether disk or store stops them."""
        self._cells[at.B_RUNNING], self._cells[at.B_IN_FLIGHT] = batches, in_flight
        self._cells[at.B_LIMIT], self._cells[at.B_PAUSED] = limit, int(is_paused)
