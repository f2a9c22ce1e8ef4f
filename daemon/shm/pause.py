"""The barrier of `POST /pause`, in the header of the segment: written by control, read by shards on every request.

Theory of operation. Control stores mode, moment and reason, then a new serial number. Every shard stores the serial
into its process row once it has seen it and has written out all that it had decided to send before: after the last of
these acknowledgements no request starts at an engine, and resuming is a store of its own.

Clocks that must stand still meanwhile ask for `paused_s`: seconds that the daemon has spent paused until a moment, the
same number in every process.
"""

from __future__ import annotations

from enum import IntEnum

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

MAX_REASON_BYTES = (at.PAUSE_REASON_WORDS - 1) * at.WORD


class Mode(IntEnum):
    RUNNING = 0
    HOLD = 1
    REJECT = 2


class Pause:
    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._cells = segment.cells
        self._reals = segment.reals

    @property
    def mode(self) -> Mode:
        return Mode(self._cells[at.H_PAUSE])

    @property
    def since(self) -> float:
        """Of the monotonic clock; of use while paused."""
        return self._reals[at.H_PAUSED_AT]

    @property
    def reason(self) -> str:
        size = min(self._cells[at.H_PAUSE_REASON], MAX_REASON_BYTES)
        first = (at.H_PAUSE_REASON + 1) * at.WORD
        return bytes(self._segment.bytes[first : first + size]).decode("utf-8", "replace")

    def paused_s(self, now: float) -> float:
        """In all, up to `now`. Grows while paused, stands still otherwise."""
        total = self._reals[at.H_PAUSED_S]
        return total + max(now - self.since, 0.0) if self._cells[at.H_PAUSE] else total

    # --- by control

    def begin(self, mode: Mode, reason: str, now: float) -> int:
        """Returns the serial that shards acknowledge. Pausing again changes mode and reason."""
        cells = self._cells
        text = reason.encode()[:MAX_REASON_BYTES].decode("utf-8", "ignore").encode()
        first = (at.H_PAUSE_REASON + 1) * at.WORD
        self._segment.bytes[first : first + len(text)] = text
        cells[at.H_PAUSE_REASON] = len(text)
        if not cells[at.H_PAUSE]:
            self._reals[at.H_PAUSED_AT] = now
        serial = cells[at.H_PAUSE_SERIAL] + 1
        self._segment.words.put(at.H_PAUSE, mode)
        self._segment.words.put(at.H_PAUSE_SERIAL, serial)
        return serial

    def end(self, now: float) -> None:
        if not self._cells[at.H_PAUSE]:
            return
        self._reals[at.H_PAUSED_S] = self.paused_s(now)
        self._segment.words.put(at.H_PAUSE, Mode.RUNNING)

    def has_acknowledged(self, shard: int, serial: int) -> bool:
        return self._segment.words.get(self._segment.layout.process(shard, at.P_PAUSE_SEEN)) >= serial

    # --- by a shard

    def acknowledge(self, shard: int) -> None:
        """After all that was decided before has been written out."""
        serial = self._segment.words.get(at.H_PAUSE_SERIAL)
        index = self._segment.layout.process(shard, at.P_PAUSE_SEEN)
        if self._cells[index] != serial:
            self._segment.words.put(index, serial)
