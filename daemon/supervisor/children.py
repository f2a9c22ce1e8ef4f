"""One child process: how it is started, what is known of it, how it is told something."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from pointsman.daemon import leash
from pointsman.daemon.interpreter import interpreter_flags
from pointsman.daemon.leash import Message
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment

HEARTBEAT_LIMIT_S = 1.7
"""a process whose heartbeat is older is stopped or stuck; looked at every 0.2 s, so noticed within 2 s"""
BOOT_LIMIT_S = 20.0


class Child:
    """A place in the process tree (shard 0, control, …) and the process that fills it now."""

    def __init__(self, name: str, index: int, segment: Segment, arguments: Sequence[str], fds: Sequence[int]) -> None:
        self.name = name
        self.index = index
        self.arguments = tuple(arguments)
        self.fds = tuple(fds)
        self.pid = 0
        self.is_ready = False
        self.channel: socket.socket | None = None
        self.started_at = 0.0
        self.early_deaths = 0
        """deaths before it was ready, in a row"""
        self.restart_at = 0.0
        self.boot_limit_s = BOOT_LIMIT_S
        self._segment = segment

    @property
    def is_running(self) -> bool:
        return self.pid != 0

    def start(self) -> None:
        ours, theirs = leash.pair()
        row = self._segment.process(self.index)
        fds = (*self.fds, theirs.fileno())
        command = [sys.executable, *interpreter_flags(), *self.arguments, "--leash-fd", str(theirs.fileno())]
        for fd in fds:
            os.set_inheritable(fd, True)
        try:
            handlers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE]
            self.pid = os.posix_spawn(sys.executable, command, os.environ, setsigdef=handlers, setsigmask=[])
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)
            theirs.close()
        self.channel = ours
        self.is_ready = False
        self.started_at = time.monotonic()
        self._note(at.P_PID, self.pid)
        self._note(at.P_HEARTBEAT_NS, 0)
        self._note(at.P_LOADED, 0)
        self._note(at.P_STARTED_NS, time.monotonic_ns())
        self._note(at.P_STATE, at.PROCESS_BOOTING)
        if row.started_ns:
            self._note(at.P_RESTARTS, row.restarts + 1)

    def ready(self) -> None:
        self.is_ready = True
        self.early_deaths = 0
        self._note(at.P_STATE, at.PROCESS_READY)

    def draining(self) -> None:
        self._note(at.P_STATE, at.PROCESS_DRAINING)

    def died(self) -> None:
        """After it was reaped."""
        if not self.is_ready:
            self.early_deaths += 1
        self.pid = 0
        self.is_ready = False
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self._note(at.P_PID, 0)
        self._note(at.P_STATE, at.PROCESS_DOWN)

    def is_stuck(self, now: float) -> bool:
        """Its heart has stopped, or it takes too long to get ready."""
        beat_ns = self._segment.process(self.index).heartbeat_ns
        if beat_ns and now - beat_ns / 1e9 > HEARTBEAT_LIMIT_S:
            return True
        return not self.is_ready and now - self.started_at > self.boot_limit_s

    def tell(self, message: Message, fd: int | None = None) -> bool:
        """False when it cannot be told: it is gone, or so far behind that it must be replaced."""
        if self.channel is None:
            return False
        try:
            leash.send(self.channel, message, fd)
        except OSError:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            if self.pid:
                os.kill(self.pid, number)

    def _note(self, word: int, value: int) -> None:
        self._segment.set_process(self.index, word, value)
