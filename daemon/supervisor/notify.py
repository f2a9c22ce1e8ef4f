"""sd_notify: one datagram per state change to whoever started us, or to nobody."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class Notifier:
    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", None)
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog_s = _watchdog_interval_s()

    def send(self, *lines: str) -> None:
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
