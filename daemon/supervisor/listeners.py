"""Listening sockets: bound once, here, and inherited, so that no process of ours that dies takes a queue with it.

One SO_REUSEPORT socket per shard spreads connections without a shared lock; closing one would reset what waits in its
queue (measured: 29 of 60), hence none is closed before the daemon ends. When an upgrade leaves fewer shards than
sockets, emptying the surplus ones first would not do: until the very moment of its closing, the kernel gives each its
share of the new connections. So they stay, and all shards accept on them beside their own.

Sockets that systemd passes (socket activation) are systemd's: every shard accepts on each of them, and they are never
shut down, so that what connects while the daemon restarts waits in their queues.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pointsman.daemon.errors import PointsmanError

ADMIN_SOCKET_MODE = 0o660
FIRST_INHERITED_FD = 3
"""SD_LISTEN_FDS_START"""


class ListenError(PointsmanError):
    """An address cannot be listened on; the message names it and the flag to change."""


def _resolve(host: str, port: int, flag: str) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror} (see {flag})") from None
    family, _, _, _, address = found[0]
    return family, address


def _bind(family: socket.AddressFamily, address: tuple[object, ...], *, reuse_port: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
    try:
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _explain(error: OSError, host: str, port: int, flag: str) -> ListenError:
    if error.errno == errno.EADDRINUSE:
        return ListenError(f"port {port} on {host} is in use; choose another with {flag}")
    if error.errno == errno.EACCES:
        return ListenError(f"port {port} on {host} needs privileges; choose one above 1023 with {flag}")
    return ListenError(f"cannot listen on {host}:{port}: {error.strerror} (see {flag})")


def data_sockets(host: str, port: int, count: int, backlog: int) -> list[socket.socket]:
    """`count` sockets on one port (port 0: any free one). Raises ListenError."""
    family, address = _resolve(host, port, "--host")
    sockets: list[socket.socket] = []
    try:
        # SO_REUSEPORT would let a second daemon of the same user share the port in silence: try without it first
        _bind(family, address, reuse_port=False).close()
        for _ in range(count):
            sock = _bind(family, address, reuse_port=True)
            sockets.append(sock)
            address = (address[0], sock.getsockname()[1], *address[2:])
        for sock in sockets:
            sock.listen(backlog)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _explain(error, host, port, "--port") from None
    return sockets


def more_data_sockets(first: socket.socket, count: int) -> list[socket.socket]:
    """On the port of `first`, not listening yet: whoever accepts on them begins with that. Raises ListenError."""
    address = first.getsockname()
    host, port = address[:2]
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            sockets.append(_bind(first.family, address, reuse_port=True))
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _explain(error, host, port, "--port") from None
    return sockets


@dataclass(frozen=True, slots=True)
class Passed:
    """A socket that systemd listens on for us."""

    name: str
    """`FileDescriptorName=` of its unit; "admin": for the admin API, any other: for clients"""
    sock: socket.socket


ADMIN = "admin"


def inherited_sockets() -> list[Passed]:
    """What systemd passes; none when it passes nothing. Raises ListenError.

    Takes the variables out of the environment: they are meant for this process alone.
    """
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = range(FIRST_INHERITED_FD, FIRST_INHERITED_FD + int(count))
    named = (*names.split(":"), *[""] * len(fds))
    return [_adopt(fd, name) for fd, name in zip(fds, named, strict=False)]


def _adopt(fd: int, name: str) -> Passed:
    remedy = "(see ListenStream= in pointsman.socket)"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"inherited descriptor {fd} is no socket: {error.strerror} {remedy}") from None
    families = (socket.AF_INET, socket.AF_INET6, *((socket.AF_UNIX,) if name == ADMIN else ()))
    if not is_listening or sock.family not in families:
        sock.close()
        raise ListenError(f"inherited descriptor {fd} is not a listening TCP socket {remedy}")
    return Passed(name, sock)


def admin_socket(where: str, backlog: int = 128) -> socket.socket:
    """`unix:PATH` or `HOST:PORT`. Raises ListenError."""
    if where.startswith("unix:"):
        return _unix_socket(where.removeprefix("unix:"), backlog)
    return tcp_socket(where, "--admin-listen", backlog)


def tcp_socket(where: str, flag: str, backlog: int = 128) -> socket.socket:
    """`HOST:PORT`; `flag` is what an error points to. Raises ListenError."""
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    family, address = _resolve(host, int(port), flag)
    try:
        sock = _bind(family, address, reuse_port=False)
        sock.listen(backlog)
    except OSError as error:
        raise _explain(error, host, int(port), flag) from None
    return sock


def _unix_socket(path: str, backlog: int) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~ADMIN_SOCKET_MODE)  # never reachable by others, not even for a moment
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror or error} (see --admin-listen)") from None
    finally:
        os.umask(mask)
    sock.listen(backlog)
    return sock


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on is what a killed daemon leaves behind; one that answers is somebody's."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(f"{path} exists and is not a socket; remove it or choose another with --admin-listen")
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror or error} (see --admin-listen)") from None
        else:
            raise ListenError(f"another pointsman listens on {path}; stop it, or choose another with --admin-listen")
        finally:
            probe.close()


def remove_unix_sockets(addresses: tuple[str, ...]) -> None:
    for where in addresses:
        if where.startswith("unix:"):
            Path(where.removeprefix("unix:")).unlink(missing_ok=True)


def with_bound_port(where: str, sock: socket.socket) -> str:
    """`where` as it was configured, with the port that `sock` really has."""
    if where.startswith("unix:"):
        return where
    return f"{where.rpartition(':')[0]}:{sock.getsockname()[1]}"


def describe(sock: socket.socket) -> str:
    """HOST:PORT as it is really bound; `unix:PATH`."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
