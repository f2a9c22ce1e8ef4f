"""The listening sockets of one daemon: which there are, who accepts on which, and whose they are to remove.

A daemon that takes over another one's goes on with every socket whose address is still configured in the same words,
and opens the others. Until the upgrade is committed, those that it has taken over still are the other one's: it neither
shuts them down nor removes their files.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pointsman.config.settings import Settings
from pointsman.daemon.supervisor import listeners
from pointsman.daemon.supervisor.handover import Handover
from pointsman.daemon.supervisor.listeners import ListenError, Passed

DATA = "data"
"""name of the data port among the sockets that were taken"""


METRICS = "metrics:"
"""before the addresses that have metrics and probes alone"""


@dataclass(slots=True)
class Doors:
    host: str
    port: int
    """As configured; 0 = any."""
    data: tuple[socket.socket, ...]
    is_socket_activated: bool
    admin: dict[str, socket.socket]
    """What control accepts on, by the address as it is configured, in that order; then with METRICS before it."""
    taken: set[str] = field(default_factory=set)
    """Of `DATA` and the admin addresses, what another daemon still owns."""
    lent: frozenset[str] = frozenset()
    """The admin addresses that systemd listens on: it keeps them, and their files, when we end."""

    def of_shard(self, index: int, shards: int) -> tuple[socket.socket, ...]:
        if self.is_socket_activated:
            return self.data
        return (self.data[index], *self.data[shards:])

    def bound(self, settings: Settings) -> Settings:
        """The settings with the ports that were really bound; names stay as they were given."""
        bound = [listeners.with_bound_port(where, sock) for where, sock in self.admin.items()]
        admin = tuple(where for where in bound if not where.startswith(METRICS))
        metrics = tuple(where.removeprefix(METRICS) for where in bound if where.startswith(METRICS))
        address, port = self.data[0].getsockname()[:2]
        host = address if self.is_socket_activated else settings.host
        return msgspec.structs.replace(settings, host=host, port=port, admin_listen=admin, metrics_listen=metrics)

    def remove_files(self) -> None:
        """Of the admin sockets that are ours."""
        listeners.remove_unix_sockets(tuple(where for where in self.admin if where not in self.taken | self.lent))

    def leave(self, taken: set[str]) -> None:
        """Another daemon goes on with these; the admin sockets that it does not want are closed for good."""
        for where, sock in self.admin.items():
            if where not in taken:
                if where not in self.lent:
                    listeners.remove_unix_sockets((where,))
                sock.close()
        self.taken = taken


def open_doors(settings: Settings, handover: Handover | None) -> Doors:
    """Raises ListenError; what was opened before it is closed again."""
    passed = listeners.inherited_sockets()
    lent = _admin_passed(settings, passed)
    doors = _data_doors(settings, handover, tuple(each.sock for each in passed if each.name != listeners.ADMIN))
    left = dict(handover.admin_fds) if handover else {}
    lent_before = handover.lent if handover else ()
    doors.lent = frozenset(lent).union(lent_before).intersection(settings.admin_listen)
    try:
        for where in (*settings.admin_listen, *(METRICS + where for where in settings.metrics_listen)):
            if where in left:
                doors.admin[where] = socket.socket(fileno=left[where])
                doors.taken.add(where)
            elif where in lent:
                doors.admin[where] = lent[where]
            elif where.startswith(METRICS):
                doors.admin[where] = listeners.tcp_socket(where.removeprefix(METRICS), "--metrics-listen")
            else:
                doors.admin[where] = listeners.admin_socket(where)
    except ListenError as error:
        doors.remove_files()
        raise _with_remedy(error, handover) from None
    if handover is not None:
        _close_the_rest(handover, doors)
    return doors


def _admin_passed(settings: Settings, passed: Sequence[Passed]) -> dict[str, socket.socket]:
    """Raises ListenError for one that `admin_listen` does not name: nobody would expect an admin API there."""
    found = {listeners.describe(each.sock): each.sock for each in passed if each.name == listeners.ADMIN}
    for where in found:
        if where not in settings.admin_listen:
            known = ", ".join(settings.admin_listen)
            raise ListenError(
                f"systemd passes {where} for the admin API, and admin_listen has {known} (--admin-listen)"
            )
    return found


def _close_the_rest(handover: Handover, doors: Doors) -> None:
    """What was passed, and is not configured any more."""
    unused = [fd for where, fd in handover.admin_fds.items() if where not in doors.taken]
    unused += handover.data_fds if DATA not in doors.taken else ()
    for fd in unused:
        os.close(fd)


def _data_doors(settings: Settings, handover: Handover | None, passed: tuple[socket.socket, ...]) -> Doors:
    if handover is not None and (
        handover.is_socket_activated or (handover.host, handover.port) == (settings.host, settings.port)
    ):
        return _inherited_doors(settings, handover)
    try:
        data = passed or tuple(listeners.data_sockets(settings.host, settings.port, settings.shards, settings.backlog))
    except ListenError as error:
        raise _with_remedy(error, handover) from None
    return Doors(settings.host, settings.port, data, bool(passed), {})


def _inherited_doors(settings: Settings, handover: Handover) -> Doors:
    data = [socket.socket(fileno=fd) for fd in handover.data_fds]
    if not handover.is_socket_activated:
        data += listeners.more_data_sockets(data[0], settings.shards - len(data))
    return Doors(settings.host, settings.port, tuple(data), handover.is_socket_activated, {}, {DATA})


def _with_remedy(error: ListenError, handover: Handover | None) -> ListenError:
    if handover is None:
        return error
    return ListenError(f"{error}; if it is the running daemon that has it, this change needs a restart")
