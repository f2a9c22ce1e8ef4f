"""What systemd is to a service, as far as the service can tell: who holds its sockets and hears what it tells."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.leeway import leeway
from tests.fakes.processes import is_alive, wait_for_orphan

START_TIMEOUT_S = 20.0

_LAUNCH = """
import fcntl, os, sys
passed = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in filter(None, sys.argv[1].split(","))]
for number, fd in enumerate(passed, start=3):
    os.dup2(fd, number, inheritable=True)
    os.close(fd)
if passed:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": sys.argv[2]}
if "WATCHDOG_USEC" in os.environ:
    os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "pointsman.daemon.main", "serve", *sys.argv[3:]])
"""


class ServiceManager:
    """Starts the daemon, several times if wished; `heard` is all that its main process said, in order."""

    def __init__(
        self,
        folder: Path,
        sockets: Sequence[socket.socket] = (),
        watchdog_s: float | None = None,
        admin_sockets: Sequence[socket.socket] = (),
    ) -> None:
        self.folder = folder
        self.heard: list[str] = []
        self.strangers: list[int] = []
        """processes that notified and were not the main one"""
        self._sockets = (*sockets, *admin_sockets)
        self._names = ":".join(["data"] * len(sockets) + ["admin"] * len(admin_sockets))
        self._environment = os.environ | {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "RUNTIME_DIRECTORY": str(folder / "run"),
            "STATE_DIRECTORY": str(folder / "state"),
            "POINTSMAN_PREFIX_INDEX_MIB": "16",
        }
        if watchdog_s is not None:
            self._environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        for name in ("run", "state"):
            (folder / name).mkdir(mode=0o700)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.bind(self._environment["NOTIFY_SOCKET"])
        self.main: subprocess.Popen[bytes] | None = None
        """As it was started; an upgrade leads to another one."""
        self.main_pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main is not None:
            if self.main_pid != self.main.pid and is_alive(self.main_pid):
                os.kill(self.main_pid, signal.SIGKILL)
            self.main.kill()
            self.main.wait()
        self._notify.close()

    @property
    def admin_socket(self) -> Path:
        return self.folder / "run" / "admin.sock"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self, *arguments: str, shards: int = 2) -> None:
        """Returns at once; `wait` for READY=1."""
        given = ["--shards", str(shards), "--admin-listen", f"unix:{self.admin_socket}", *arguments]
        passed = [sock.fileno() for sock in self._sockets]
        command = [sys.executable, "-c", _LAUNCH, ",".join(map(str, passed)), self._names, *given]
        with (self.folder / "log").open("ab") as log:
            self.main = subprocess.Popen(command, env=self._environment, pass_fds=passed, stderr=log)
        self.main_pid = self.main.pid

    def signal(self, number: int) -> None:
        os.kill(self.main_pid, number)

    def stop(self, timeout_s: float = START_TIMEOUT_S) -> int:
        assert self.main is not None
        self.signal(signal.SIGTERM)
        code = self.main.wait(timeout_s * leeway())
        return code if self.main_pid == self.main.pid else wait_for_orphan(self.main_pid, timeout_s)

    # --- notifications

    def wait(self, line: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until a line that was not there before is said."""
        self.wait_for(lambda said: said == line, line, timeout_s)

    def wait_for(self, fits: Callable[[str], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> str:
        deadline = time.monotonic() + timeout_s * leeway()
        while True:
            for said in self._hear(deadline, what):
                if fits(said):
                    return said

    def listen_until(self, deadline: float) -> list[str]:
        """All that is said until then (seconds of the monotonic clock)."""
        before = len(self.heard)
        while (left := deadline - time.monotonic()) > 0:
            self._notify.settimeout(left)
            try:
                self._receive()
            except TimeoutError:
                break
        return self.heard[before:]

    def _hear(self, deadline: float, what: str) -> list[str]:
        self._notify.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return self._receive()
        except TimeoutError:
            raise AssertionError(f"not said: {what}; heard {self.heard}\n{self.log}") from None

    def _receive(self) -> list[str]:
        data, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(12))
        sender = struct.unpack("iII", ancillary[0][2])[0]
        if sender != self.main_pid:
            self.strangers.append(sender)
        lines = data.decode().split("\n")
        for line in lines:
            if line.startswith("MAINPID="):
                self.main_pid = int(line.removeprefix("MAINPID="))
        self.heard += lines
        return lines
