"""What the processes of a gateway on this machine have cost: found by port, admin socket or pid, read from /proc.

CPU time is the scheduler's own account in nanoseconds, of all threads of the process tree; memory is the proportional
set size, which counts pages that processes share once over all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_ACCEPTS = 1 << 16
_PROC = Path("/proc")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class NoProcess(Exception):
    """Says why there is none to be measured."""


@dataclass(slots=True, frozen=True)
class Cost:
    """Of a process tree so far."""

    cpu_ns: int
    pss_bytes: int
    pids: tuple[int, ...]


def find_by_port(port: int) -> int:
    """The process that owns what listens on that TCP port of this machine. Raises NoProcess."""
    return _owner(f"port {port}", _tcp_inodes(port))


def find_by_socket(path: str) -> int:
    """The process that owns the unix socket `path`, as a gateway its admin socket. Raises NoProcess."""
    return _owner(path, _unix_inodes(str(Path(path).absolute())))


def _owner(where: str, inodes: set[str]) -> int:
    """The topmost of those that hold the socket: a supervisor hands it down to its children."""
    if not inodes:
        raise NoProcess(f"nothing on this machine listens on {where}")
    holders = _holders(inodes)
    for pid in sorted(holders):
        if holders.isdisjoint(_ancestors(pid)):
            return pid
    raise NoProcess(f"what listens on {where} belongs to another user: be that user or root, or name --gateway-pid")


def check_pid(pid: int) -> int:
    """Raises NoProcess when there is none, or it belongs to another user."""
    if measure(pid) is None:
        raise NoProcess(f"there is no process {pid} whose figures this user may read")
    return pid


def measure(root: int) -> Cost | None:
    """Of `root` and all its descendants; None when it is gone."""
    pids = tuple(_tree(root))
    cpu_ns = [_cpu_ns(pid) for pid in pids]
    if not cpu_ns or cpu_ns[0] is None:
        return None
    return Cost(sum(filter(None, cpu_ns)), sum(_pss_bytes(pid) for pid in pids), pids)


def _tcp_inodes(port: int) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(*_GONE):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _unix_inodes(path: str) -> set[str]:
    found = set()
    with suppress(*_GONE):
        for line in (_PROC / "net/unix").read_text().splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & _ACCEPTS:
                found.add(f"socket:[{fields[6]}]")
    return found


def _holders(inodes: set[str]) -> set[int]:
    holders = set()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(*_GONE):
                if any(link in inodes for link in _links(entry / "fd")):
                    holders.add(int(entry.name))
    return holders


def _links(folder: Path) -> Iterator[str]:
    for name in os.listdir(folder):  # noqa: PTH208 - thousands of them
        with suppress(*_GONE):
            yield os.readlink(folder / name)  # noqa: PTH115


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except _GONE:
            return
        pid = int(fields[1])
        yield pid


def _tree(pid: int) -> Iterable[int]:
    yield pid
    with suppress(*_GONE):
        for task in (_PROC / str(pid) / "task").iterdir():
            with suppress(*_GONE):
                for child in (task / "children").read_text().split():
                    yield from _tree(int(child))


def _cpu_ns(pid: int) -> int | None:
    total = 0
    try:
        for task in (_PROC / str(pid) / "task").iterdir():
            with suppress(*_GONE):
                total += int((task / "schedstat").read_text().split()[0])
    except _GONE:
        return None
    return total or _ticks_ns(pid)


def _ticks_ns(pid: int) -> int | None:
    """For kernels without schedstat: in steps of 10 ms."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except _GONE:
        return None
    return (int(fields[11]) + int(fields[12])) * _TICK_NS


def _pss_bytes(pid: int) -> int:
    with suppress(*_GONE):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
