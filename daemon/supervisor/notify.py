"""sd_notify: one datagram per state change to whoever started us, or to nobody.

The order that systemd expects: READY, then any number of RELOADING … READY pairs, then STOPPING. STATUS and WATCHDOG
may come at any time. In an upgrade the old supervisor's last word is MAINPID, the new one's first READY.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

STATUS_INTERVAL_S = 1.0
"""least time between two looks at what the status line says"""


class Notifier:
    """Takes the variables out of the environment: children must neither speak for us nor feed our watchdog."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", None)
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._watchdog_s = _watchdog_interval_s()
        self.environment: dict[str, str] = {}
        """for another supervisor, which speaks from `hand_over` on"""
        if address:
            self.environment["NOTIFY_SOCKET"] = address
        if self._watchdog_s:
            self.environment["WATCHDOG_USEC"] = str(int(self._watchdog_s * 2_000_000))
        self._next_watchdog = 0.0
        self._status = ""
        self._next_status = 0.0

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        """Ends with the next `ready`. The time stamp is for Type=notify-reload; others pass over it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, within_s: float) -> None:
        """`within_s`: how long the stop may take. A TimeoutStopSec that is shorter gives way to it."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def hand_over(self, pid: int) -> None:
        """From now on that process speaks, and feeds the watchdog; nothing more is said here."""
        self._send(f"MAINPID={pid}")
        self._address = None

    def follow(self, now: float, status: Callable[[], str]) -> None:
        """Called often; once in STATUS_INTERVAL_S it looks, and sends the line for `systemctl status` if it changed."""
        if self._address is None or now < self._next_status:
            return
        self._next_status = now + STATUS_INTERVAL_S
        line = status()
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def feed(self, now: float) -> None:
        """The watchdog, when it is due; only to be called while all is well."""
        if self._watchdog_s is not None and now >= self._next_watchdog:
            self._next_watchdog = now + self._watchdog_s
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto("\n".join(lines).encode(), self._address)


def _watchdog_interval_s() -> float | None:
    """Half of what systemd waits, as its documentation advises; None when it does not watch us."""
    microseconds = os.environ.pop("WATCHDOG_USEC", "")
    pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or pid != str(os.getpid()):
        return None
    return int(microseconds) / 2_000_000
