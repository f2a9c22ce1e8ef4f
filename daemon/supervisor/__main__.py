"""`python -m pointsman.daemon.supervisor --settings-fd N --command …`: what `pointsman serve` becomes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pointsman.config import settings as settings_codec
from pointsman.config.settings import Settings
from pointsman.daemon import leash
from pointsman.daemon.errors import EXIT_UNAVAILABLE
from pointsman.daemon.shm.log_settings import LogSettings
from pointsman.daemon.shm.native import name_process
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.supervisor import handover, listeners
from pointsman.daemon.supervisor.arbiter import Arbiter, Estate
from pointsman.daemon.supervisor.children import Child
from pointsman.daemon.supervisor.doors import Doors, open_doors
from pointsman.daemon.supervisor.handover import Handover, HandoverError, Predecessor
from pointsman.daemon.supervisor.listeners import ListenError
from pointsman.daemon.supervisor.notify import Notifier
from pointsman.daemon.telemetry.logs import follow_level
from pointsman.daemon.workers.saved_state import FILE_NAME, read_seed


def _shard(index: int, shards: int, state: RoutingState, settings_fd: int, doors: Doors) -> Child:
    segment = state.segment
    listen_fds = [sock.fileno() for sock in doors.of_shard(index, shards)]
    fds = (settings_fd, segment.fd, state.index.fd, *listen_fds)
    arguments = ["-m", "pointsman.daemon.shard", "--index", str(index), "--settings-fd", str(settings_fd)]
    arguments += ["--segment-fd", str(segment.fd), "--prefix-fd", str(state.index.fd)]
    arguments += ["--listen-fds", ",".join(map(str, listen_fds))]
    arguments += ["--listeners-outlive-us"] if doors.is_socket_activated else []
    return Child(f"shard {index}", index, segment, arguments, fds)


def _control(state: RoutingState, settings_fd: int, doors: Doors) -> Child:
    segment, index_fd = state.segment, state.index.fd
    admin_fds = [sock.fileno() for sock in doors.admin.values()]
    arguments = ["-m", "pointsman.daemon.control", "--settings-fd", str(settings_fd)]
    arguments += ["--segment-fd", str(segment.fd), "--prefix-fd", str(index_fd)]
    arguments += ["--admin-fds", ",".join(map(str, admin_fds))]
    ports = {sock.getsockname()[1] for sock in doors.data}
    arguments += ["--data-ports", ",".join(map(str, sorted(ports)))]
    return Child("control", segment.layout.control, segment, arguments, (settings_fd, segment.fd, index_fd, *admin_fds))


def _batches(segment: Segment, settings_fd: int) -> Child:
    arguments = ["-m", "pointsman.daemon.batches", "--settings-fd", str(settings_fd)]
    arguments += ["--segment-fd", str(segment.fd)]
    return Child("batches", segment.layout.batches, segment, arguments, (settings_fd, segment.fd))


def _state(settings: Settings) -> RoutingState:
    """Raises ValueError for a prefix index that is too small, OSError for memory that is not to be had."""
    segment = Segment.create(settings.shards, settings.max_workers)
    size = IndexSize(settings.prefix_index_mib, settings.prefix_block_bytes)
    seed = read_seed(Path(settings.state_dir) / FILE_NAME)  # else nothing that was saved could be found again
    return RoutingState.create(segment, size, settings.max_tree_size, seed)


def run(settings: Settings, command: Sequence[str]) -> int:
    """`command` starts this daemon again, for an upgrade; empty when it is not known."""
    heritage: Handover | None = None
    try:
        heritage = handover.take(os.environ)
        doors = open_doors(settings, heritage)
    except (HandoverError, ListenError) as error:
        return _not_started(str(error), heritage)
    try:
        arbiter = _arbiter(doors.bound(settings), doors, heritage, command)
    except (ValueError, OSError, MemoryError) as error:
        doors.remove_files()
        return _not_started(f"prefix_index_mib = {settings.prefix_index_mib}: {error}", heritage)
    try:
        return arbiter.run()
    finally:
        doors.remove_files()


def _not_started(reason: str, heritage: Handover | None) -> int:
    print(f"pointsman: {reason}", file=sys.stderr)
    if heritage is not None:
        heritage.refuse(reason)
    return EXIT_UNAVAILABLE


def _arbiter(settings: Settings, doors: Doors, heritage: Handover | None, command: Sequence[str]) -> Arbiter:
    """Raises as `_state` does."""
    state = _state(settings)
    log_settings = LogSettings(state.segment)
    log_settings.put(settings.log_level, settings.access_log_sample)
    follow_level(log_settings)
    settings_fd = leash.sealed_memfd("pointsman-settings", settings_codec.encode(settings))
    shards = [_shard(index, settings.shards, state, settings_fd, doors) for index in range(settings.shards)]
    control = _control(state, settings_fd, doors)
    batches = _batches(state.segment, settings_fd) if settings.batch_store is not None else None
    listen = listeners.describe(doors.data[0])
    arbiter = Arbiter(settings, state, shards, control, Notifier(), listen, Estate(doors, command), batches)
    if heritage is not None:
        arbiter.follow(Predecessor(heritage), handover.inherited_generation(heritage, settings))
    return arbiter


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pointsman.daemon.supervisor")
    parser.add_argument("--settings-fd", type=int, required=True)
    parser.add_argument("--command", nargs=argparse.REMAINDER, default=[])
    arguments = parser.parse_args(argv)
    settings = settings_codec.decode(leash.read_all(arguments.settings_fd))
    os.close(arguments.settings_fd)
    name_process("pointsman")
    return run(settings, arguments.command)


if __name__ == "__main__":
    sys.exit(main())
