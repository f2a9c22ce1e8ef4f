"""`python -m pointsman.daemon.supervisor --settings-fd N`: what `pointsman serve` becomes with its settings read."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import dataclass

import msgspec

from pointsman.config import settings as settings_codec
from pointsman.config.settings import Settings
from pointsman.daemon import leash
from pointsman.daemon.errors import EXIT_UNAVAILABLE
from pointsman.daemon.shm.native import name_process
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.supervisor import listeners
from pointsman.daemon.supervisor.arbiter import Arbiter
from pointsman.daemon.supervisor.children import Child
from pointsman.daemon.supervisor.notify import Notifier


@dataclass(frozen=True, slots=True)
class _Listeners:
    """Of the data port."""

    by_shard: tuple[tuple[socket.socket, ...], ...]
    are_inherited: bool

    @property
    def first(self) -> socket.socket:
        return self.by_shard[0][0]


def _listeners(settings: Settings) -> _Listeners:
    """systemd's sockets if it passes any, for all shards; else one of our own for each. Raises ListenError."""
    inherited = tuple(listeners.inherited_sockets())
    if inherited:
        return _Listeners((inherited,) * settings.shards, are_inherited=True)
    own = listeners.data_sockets(settings.host, settings.port, settings.shards, settings.backlog)
    return _Listeners(tuple((sock,) for sock in own), are_inherited=False)


def _shard(index: int, state: RoutingState, settings_fd: int, data: _Listeners) -> Child:
    segment = state.segment
    listen_fds = [sock.fileno() for sock in data.by_shard[index]]
    fds = (settings_fd, segment.fd, state.index.fd, *listen_fds)
    arguments = ["-m", "pointsman.daemon.shard", "--index", str(index), "--settings-fd", str(settings_fd)]
    arguments += ["--segment-fd", str(segment.fd), "--prefix-fd", str(state.index.fd)]
    arguments += ["--listen-fds", ",".join(map(str, listen_fds))]
    arguments += ["--listeners-outlive-us"] if data.are_inherited else []
    return Child(f"shard {index}", index, segment, arguments, fds)


def _control(state: RoutingState, settings_fd: int, sockets: list[socket.socket]) -> Child:
    segment, index_fd = state.segment, state.index.fd
    admin_fds = [sock.fileno() for sock in sockets]
    arguments = ["-m", "pointsman.daemon.control", "--settings-fd", str(settings_fd)]
    arguments += ["--segment-fd", str(segment.fd), "--prefix-fd", str(index_fd)]
    arguments += ["--admin-fds", ",".join(map(str, admin_fds))]
    return Child("control", segment.layout.control, segment, arguments, (settings_fd, segment.fd, index_fd, *admin_fds))


def _state(settings: Settings) -> RoutingState:
    """Raises ValueError for a prefix index that is too small, OSError for memory that is not to be had."""
    segment = Segment.create(settings.shards, settings.max_workers)
    size = IndexSize(settings.prefix_index_mib, settings.prefix_block_bytes)
    return RoutingState.create(segment, size, settings.max_tree_size)


def _bound(settings: Settings, data: _Listeners, admin: list[socket.socket]) -> Settings:
    """The settings with the ports that were really bound (0 asks for any); names stay as they were given."""
    listen = tuple(map(listeners.with_bound_port, settings.admin_listen, admin))
    address, port = data.first.getsockname()[:2]
    host = address if data.are_inherited else settings.host
    return msgspec.structs.replace(settings, host=host, port=port, admin_listen=listen)


def run(settings: Settings) -> int:
    admin: list[socket.socket] = []
    try:
        data = _listeners(settings)
        admin += (listeners.admin_socket(where) for where in settings.admin_listen)
    except listeners.ListenError as error:
        print(f"pointsman: {error}", file=sys.stderr)
        listeners.remove_unix_sockets(settings.admin_listen[: len(admin)])
        return EXIT_UNAVAILABLE
    settings = _bound(settings, data, admin)
    settings_fd = leash.sealed_memfd("pointsman-settings", settings_codec.encode(settings))
    try:
        state = _state(settings)
    except (ValueError, OSError, MemoryError) as error:
        print(f"pointsman: prefix_index_mib = {settings.prefix_index_mib}: {error}", file=sys.stderr)
        listeners.remove_unix_sockets(settings.admin_listen)
        return EXIT_UNAVAILABLE
    shards = [_shard(index, state, settings_fd, data) for index in range(settings.shards)]
    control = _control(state, settings_fd, admin)
    arbiter = Arbiter(settings, state, shards, control, Notifier(), listeners.describe(data.first))
    try:
        return arbiter.run()
    finally:
        listeners.remove_unix_sockets(settings.admin_listen)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pointsman.daemon.supervisor")
    parser.add_argument("--settings-fd", type=int, required=True)
    fd = parser.parse_args(argv).settings_fd
    settings = settings_codec.decode(leash.read_all(fd))
    os.close(fd)
    name_process("pointsman")
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
