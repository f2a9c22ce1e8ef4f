"""Log lines of a shard on standard error, written in batches and never at the cost of a request.

A reader that stalls must not stall a shard: lines are kept up to a bound, then dropped and counted. Standard error is
shared with other processes, so its own blocking mode is left alone (a pipe is opened a second time, journald's socket
is written with MSG_DONTWAIT) and lines are written in units that the kernel keeps whole.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress

FLUSH_S = 0.05
MAX_BUFFERED_BYTES = 1 << 20
FILE_BATCH_BYTES = 1 << 16


def _open_writer(fd: int) -> tuple[Callable[[bytes], int], int]:
    """(write without blocking, largest unit that does not mix with other writers' lines)."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return (lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)), select.PIPE_BUF
    if stat.S_ISFIFO(mode):
        with suppress(OSError):
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return (lambda data: os.write(own, data)), select.PIPE_BUF
    return (lambda data: os.write(fd, data)), FILE_BATCH_BYTES


class LineWriter:
    """Batches lines; `count_dropped` is told how many were lost."""

    def __init__(
        self,
        fd: int,
        call_later: Callable[[float, Callable[[], None]], object],
        count_dropped: Callable[[int], None],
    ) -> None:
        self._write, self._batch_bytes = _open_writer(fd)
        self._call_later = call_later
        self._count_dropped = count_dropped
        self._lines: list[bytes] = []
        self._size = 0
        self._is_scheduled = False

    def line(self, line: bytes) -> None:
        """`line` ends with a newline."""
        if self._size > MAX_BUFFERED_BYTES:
            self._count_dropped(1)
            return
        self._lines.append(line)
        self._size += len(line)
        if not self._is_scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._is_scheduled = True
        self._call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        self._is_scheduled = False
        lines, start = self._lines, 0
        while start < len(lines):
            end = self._batch_end(start)
            batch = b"".join(lines[start:end])
            try:
                written = self._write(batch)
            except BlockingIOError:
                written = 0
            except OSError:  # the reader is gone; there is nobody left to tell
                written = len(batch)
            self._size -= written
            if written < len(batch):
                lines[:end] = [batch[written:]]
                self._schedule()
                return
            start = end
        lines.clear()

    def _batch_end(self, start: int) -> int:
        """Of the lines from `start` on, how far one unit goes; a line at least."""
        lines, end = self._lines, start + 1
        size = len(lines[start])
        while end < len(lines) and size + len(lines[end]) <= self._batch_bytes:
            size += len(lines[end])
            end += 1
        return end
