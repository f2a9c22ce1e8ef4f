"""What the gateway and the process that holds the Mooncake client say to each other.

A lane is a stream socket and a piece of shared memory (a memfd), used by one call at a time. Messages are MessagePack
after their length (4 bytes, big-endian); values never travel in them but lie in the shared memory.
"""

from __future__ import annotations

import socket
import time
from typing import Literal, TypeVar

import msgspec

Step = Literal["upsert", "look", "read", "remove"]

_LENGTH_BYTES = 4
M = TypeVar("M")


class Setup(msgspec.Struct, frozen=True):
    """The client's arguments, as the Mooncake wheel names them."""

    local_hostname: str
    metadata_server: str
    global_segment_size: int
    local_buffer_size: int
    protocol: str
    rdma_devices: str
    master_server_addr: str
    hard_pin: bool
    replicas: int


class Started(msgspec.Struct, frozen=True):
    """First `problem` of the import ("" = loaded), then, in a second message, what `setup` returned."""

    problem: str = ""
    code: int = 0


class Request(msgspec.Struct, frozen=True):
    step: Step
    keys: list[str]
    offsets: list[int] = []
    sizes: list[int] = []
    arena_bytes: int = 0
    with_replicas: bool = False
    """count the copies, of what was upserted or looked at"""


class Reply(msgspec.Struct, frozen=True):
    numbers: list[int]
    """a key each: upsert, remove 0 or a code; look: the size or a code; read: bytes read or a code"""
    replicas: list[int] = []
    """a key each, where they were counted: complete copies in memory, each in another segment"""


class Ended(ConnectionError):
    """The other side is gone."""


def send(sock: socket.socket, message: msgspec.Struct) -> None:
    """Raises OSError, TimeoutError among them."""
    body = msgspec.msgpack.encode(message)
    sock.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)


def receive(sock: socket.socket, kind: type[M], timeout_s: float | None = None) -> M:
    """Raises Ended, TimeoutError or another OSError."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    size = int.from_bytes(_read(sock, _LENGTH_BYTES, deadline), "big")
    return msgspec.msgpack.decode(_read(sock, size, deadline), type=kind)


def _read(sock: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        got = sock.recv_into(view)
        if not got:
            raise Ended("the other side is gone")
        view = view[got:]
    return data
