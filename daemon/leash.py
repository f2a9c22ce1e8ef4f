"""The channel between the supervisor and each of its children: a SOCK_SEQPACKET pair, one message per packet.

A message is JSON with at most one file descriptor (a sealed memfd with a snapshot). End of file on the child's side
means that the supervisor is gone: the child ends. Messages are few and small (a rollout, a stop), so no framing and
no acknowledgement layer is needed: the kernel keeps packets whole and in order.

    supervisor -> shard     load(generation, fd)  serve  drain  retire
    shard -> supervisor     ready  loaded(generation)  failed(generation, reason)
    control -> supervisor   hello  standing_by  ready  publish(generation, fd)  upgrade(timeout_s)  yielded
    supervisor -> control   welcome(generation[, fd], stands_by, floor)  published(generation)  reload  drain
                            refused(generation, reason)  go(floor)  yield  upgraded(pid, version)
                            upgrade_refused(reason)  upgrade_failed(reason)
    batches -> supervisor   ready
    supervisor -> batches   drain

In an upgrade two supervisors talk in the same way (supervisor/handover.py):

    new -> old   standing_by(pid, version, took)  serving  failed(reason)  stop(is_now)
    old -> new   go(floor)  committed
"""

from __future__ import annotations

import array
import os
import socket

import msgspec

MAX_MESSAGE_BYTES = 65536


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    kind: str
    generation: int = 0
    reason: str = ""
    timeout_s: float = 0.0
    stands_by: bool = False
    """Another daemon still owns the state directory and the admin sockets: get ready, and wait for `go`."""
    floor: int = 0
    """The generation that this daemon's clients have seen elsewhere: what is published next is above it."""
    pid: int = 0
    version: str = ""
    took: tuple[str, ...] = ()
    """Names of the listening sockets that the new daemon goes on with."""
    is_now: bool = False


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Message)


def pair() -> tuple[socket.socket, socket.socket]:
    """(supervisor's end, child's end); the supervisor's never blocks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def send(sock: socket.socket, message: Message, fd: int | None = None) -> None:
    """Raises OSError when the peer is gone (or BlockingIOError: so far behind that its queue is full)."""
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([_encoder.encode(message)], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[Message | None, int | None]:
    """(message, fd); the message is None at end of file. Raises BlockingIOError when nothing waits."""
    data, ancillary, _flags, _address = sock.recvmsg(MAX_MESSAGE_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    fd = None
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fd = array.array("i", payload[:4])[0]
    return (_decoder.decode(data), fd) if data else (None, fd)


def sealed_memfd(name: str, data: bytes) -> int:
    """A read-only in-memory file: whoever holds it may trust that it never changes."""
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_all(fd: int) -> bytes:
    """The whole content of a sealed memfd, whatever the file offset."""
    return os.pread(fd, os.fstat(fd).st_size, 0)
