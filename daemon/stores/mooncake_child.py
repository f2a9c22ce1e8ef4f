"""The process that holds a Mooncake client: `python -m pointsman.daemon.stores.mooncake_child`.

The client may abort the process, crash in it, or stand still for half a minute; here that harms nobody else. This
process judges nothing: it makes the calls that answer per key, and hands over what they said. It ends when its parent
does, whatever the client is doing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import mmap
import os
import signal
import socket
import sys
import threading
from typing import Any

import msgspec

from pointsman.daemon.shm.native import die_with_parent, name_process
from pointsman.daemon.stores.mooncake_wire import Reply, Request, Setup, Started, receive, send

OBJECT_NOT_FOUND = -704
REPLICA_IS_NOT_READY = -703
_ABSENCE = {0: OBJECT_NOT_FOUND, 1: REPLICA_IS_NOT_READY}
"""What `is_exist` says of an object without a description; everything else it says is a code."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--leash-fd", type=int, required=True)
    parser.add_argument("--lane", action="append", required=True, metavar="SOCKET-FD:MEMORY-FD")
    parser.add_argument("--setup", required=True, metavar="JSON")
    arguments = parser.parse_args(argv)
    _end_with(arguments.parent, arguments.leash_fd)
    name_process("pointsman-store")
    lanes = [tuple(map(int, lane.split(":"))) for lane in arguments.lane]
    sockets = [socket.socket(fileno=fd) for fd, _ in lanes]
    setup = msgspec.json.decode(arguments.setup, type=Setup)
    client = _connect(setup, sockets[0])
    if client is None:
        return 1
    threads = [
        threading.Thread(target=_Lane(client, setup, sock, memory).serve, daemon=True)
        for sock, (_, memory) in zip(sockets, lanes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


def _end_with(parent: int, leash_fd: int) -> None:
    """Twice over: the signal also ends a process that is stopped, the leash one whose parent ended before the call."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)

    def watch() -> None:
        os.read(leash_fd, 1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _connect(setup: Setup, sock: socket.socket) -> Any:
    """The client, set up; None after a failure, which the parent has been told."""
    try:
        store = importlib.import_module("mooncake.store")
    except ImportError as error:
        send(sock, Started(problem=str(error) or "cannot be imported"))
        return None
    send(sock, Started())
    client = store.MooncakeDistributedStore()
    code = client.setup(
        setup.local_hostname,
        setup.metadata_server,
        setup.global_segment_size,
        setup.local_buffer_size,
        setup.protocol,
        setup.rdma_devices,
        setup.master_server_addr,
    )
    send(sock, Started(code=code))
    # A client that is not set up crashes the process in most of its calls.
    return client if code == 0 else None


class _Lane:
    def __init__(self, client: Any, setup: Setup, sock: socket.socket, memory_fd: int) -> None:
        self._client = client
        self._sock = sock
        self._memory_fd = memory_fd
        self._memory: mmap.mmap | None = None
        self._address = 0
        self._config = importlib.import_module("mooncake.store").ReplicateConfig()
        self._config.replica_num = setup.replicas
        self._config.with_hard_pin = setup.hard_pin

    def serve(self) -> None:
        steps = {"upsert": self._upsert, "look": self._look, "read": self._read, "remove": self._remove}
        while True:
            try:
                request = receive(self._sock, Request)
                send(self._sock, steps[request.step](request))
            except OSError:
                os._exit(0)

    def _upsert(self, request: Request) -> Reply:
        codes = self._client.batch_upsert_from(request.keys, self._pointers(request), request.sizes, self._config)
        if not request.with_replicas:
            return Reply(codes)
        found = self._client.batch_get_replica_desc(request.keys)
        return Reply(codes, [_copies(found.get(key, ())) for key in request.keys])

    def _look(self, request: Request) -> Reply:
        """The descriptions tell sizes in one call, but give no reason where there is none: that takes a second one."""
        found = self._client.batch_get_replica_desc(request.keys)
        numbers = [_size(found.get(key, ())) for key in request.keys]
        unknown = [place for place, number in enumerate(numbers) if number <= 0]
        if unknown:
            exist = self._client.batch_is_exist([request.keys[place] for place in unknown])
            for place, answer in zip(unknown, exist, strict=True):
                numbers[place] = _ABSENCE.get(int(answer), int(answer))
        return Reply(numbers, [_copies(found.get(key, ())) for key in request.keys] if request.with_replicas else [])

    def _read(self, request: Request) -> Reply:
        return Reply(self._client.batch_get_into(request.keys, self._pointers(request), request.sizes))

    def _remove(self, request: Request) -> Reply:
        return Reply(self._client.batch_remove(request.keys, True))

    def _pointers(self, request: Request) -> list[int]:
        if self._memory is None or len(self._memory) != request.arena_bytes:
            self._map(request.arena_bytes)
        return [self._address + offset for offset in request.offsets]

    def _map(self, size: int) -> None:
        if self._memory is not None:
            self._client.unregister_buffer(self._address)
            self._memory.close()
        self._memory = mmap.mmap(self._memory_fd, size)
        start = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(start)
        del start  # or the mapping could never be closed
        code = self._client.register_buffer(self._address, size)
        if code != 0:
            print(f"register_buffer: {code}", file=sys.stderr)  # TCP works without; RDMA then fails per key


def _size(replicas: Any) -> int:
    for replica in replicas:
        if replica.is_memory_replica():
            size: int = replica.get_memory_descriptor().buffer_descriptor.size
            return size
    return 0


def _copies(replicas: Any) -> int:
    """Complete ones in memory, each in another segment."""
    return len(
        {
            replica.get_memory_descriptor().buffer_descriptor.transport_endpoint
            for replica in replicas
            if replica.is_memory_replica() and replica.status.name == "COMPLETE"
        }
    )


if __name__ == "__main__":
    raise SystemExit(main())
