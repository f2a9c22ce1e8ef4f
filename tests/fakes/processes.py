"""Processes as the kernel sees them: who lives, who is whose child, what they have cost."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tests.fakes.leeway import leeway

_PR_SET_CHILD_SUBREAPER = 36
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (the name before it may hold anything); empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    """Zombies are not."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def is_stopped(pid: int) -> bool:
    return stat_fields(pid)[:1] == ["T"]


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time that these processes have used so far."""
    return sum(sum(map(int, fields[11:13])) for pid in pids if (fields := stat_fields(pid))) * _TICK_S


def mapped_files(pid: int) -> set[str]:
    """Names of the files that are mapped into its memory, shared libraries above all."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of their own that these processes hold; the shared segment and mapped files are not in it."""
    return sum(int(field.split()[1]) for pid in pids for field in _status_lines(pid, "RssAnon")) * 1024


def _status_lines(pid: int, name: str) -> list[str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [line for line in lines if line.startswith(f"{name}:")]


def open_files(pid: int) -> list[str]:
    """What its file descriptors refer to."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float) -> float:
    """Poll the kernel until `holds`; returns how long that took. `timeout_s` is that of a quiet machine."""
    started = time.monotonic()
    timeout_s *= leeway()
    pause = threading.Event()
    while not holds():
        assert time.monotonic() - started < timeout_s, f"not in {timeout_s} s: {what}"
        pause.wait(0.005)
    return time.monotonic() - started


def wait_gone(pids: Iterable[int], timeout_s: float) -> float:
    """Returns how long it took until none of them lived."""
    waiting = list(pids)
    return wait_until(f"{waiting} have ended", lambda: not any(map(is_alive, waiting)), timeout_s)


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process: somebody can wait for them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def our_programs() -> set[int]:
    """Daemons, simulated engines and the like that are children of this process, by birth or adoption."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return {pid for pid in found if is_alive(pid) and b"\0-m\0pointsman." in _command_line(pid)}


def _command_line(pid: int) -> bytes:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def wait_for_orphan(pid: int, timeout_s: float) -> int:
    """The exit code of an adopted process. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s * leeway()
    pause = threading.Event()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} runs on")
        pause.wait(0.005)
