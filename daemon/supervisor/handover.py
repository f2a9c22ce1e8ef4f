"""What a running supervisor leaves to the one that is to follow it in an upgrade, and how the two agree.

Theory of operation. The old supervisor starts `pointsman serve` again, by its own command line in its own environment,
so that new code and settings that need a restart apply. The listening sockets are inherited: they stay open all the
time, and whoever connects waits in their queues at worst. POINTSMAN_HANDOVER_FD names a sealed memfd that says which
descriptor is what (`Handover`, JSON). The two then talk over a SOCK_SEQPACKET pair, in messages of `daemon.leash`:

    old                                            new
    starts it                                      reads settings and files, takes the sockets, starts its processes;
                                                   shards load the generation, control asks the workers
                                <── standing_by    all that can fail without anybody noticing has been tried
    control gives up the state directory
    and the admin sockets
                            go(floor) ──>          control locks and reads again, publishes what changed meanwhile,
                                                   opens the admin API; shards accept, beside the old ones
                                <── serving
    MAINPID= to systemd
                            committed ──>          READY=1 to systemd
    shards stop accepting, finish, and end         (end of file)

Until `committed` the old daemon is the daemon: the new one's end, its `failed`, or the old one's patience running out
lead to nothing but the end of the new one and a new control process for the old one. The end of file before `committed`
tells the new one to be gone.

The new process is started by a child that ends at once: its parent is then the service manager (or whoever adopts
orphans), which will notice its end from the first moment on, and nobody is left behind as a zombie.

The two must agree on this file alone. A version that does not know this protocol finds its port taken, and ends.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress

import msgspec

from pointsman.config import snapshot as snapshot_codec
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon import leash
from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.leash import Message
from pointsman.daemon.version import VERSION

VARIABLE = "POINTSMAN_HANDOVER_FD"
PROTOCOL = 1


class HandoverError(PointsmanError):
    """Taking over, or starting the one who should, is not possible; the message says why."""


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors are those of the new process."""

    protocol: int
    pid: int
    version: str
    channel_fd: int
    host: str
    port: int
    """Of the data port, as the old daemon's settings had it: 0 stays 0."""
    data_fds: tuple[int, ...]
    is_socket_activated: bool
    admin_fds: dict[str, int]
    """by the address as the old daemon's settings had it; those for metrics alone begin with `metrics:`"""
    generation: int
    snapshot_fd: int
    """of that generation; -1: none was published"""
    lent: tuple[str, ...] = ()
    """those of `admin_fds` that systemd listens on"""

    @property
    def fds(self) -> tuple[int, ...]:
        optional = (self.snapshot_fd,) if self.snapshot_fd >= 0 else ()
        return (self.channel_fd, *self.data_fds, *self.admin_fds.values(), *optional)

    def refuse(self, reason: str) -> None:
        """To the running daemon: why nobody takes over."""
        _refuse(self.channel_fd, reason)


class _Outline(msgspec.Struct, frozen=True):
    """What every protocol has."""

    protocol: int
    channel_fd: int


def _refuse(channel_fd: int, reason: str) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(channel_fd)) as channel:
        leash.send(channel, Message("failed", reason=reason))


def read(environ: Mapping[str, str]) -> Handover | None:
    """None at an ordinary start. Raises HandoverError."""
    text = environ.get(VARIABLE, "")
    if not text:
        return None
    try:
        data = leash.read_all(int(text))
        outline = msgspec.json.decode(data, type=_Outline)
        if outline.protocol != PROTOCOL:
            reason = (
                f"version {VERSION} takes over by protocol {PROTOCOL} only, not {outline.protocol}: restart instead"
            )
            _refuse(outline.channel_fd, reason)
            raise HandoverError(reason)
        return msgspec.json.decode(data, type=Handover)
    except (ValueError, OSError, msgspec.MsgspecError) as error:
        raise HandoverError(f"${VARIABLE} is not what a running pointsman passes: {error}") from None


def take(environ: MutableMapping[str, str]) -> Handover | None:
    """As `read`, by who takes over: no child of ours is to find any of it. Raises HandoverError."""
    handover = read(environ)
    if handover is not None:
        os.close(int(environ.pop(VARIABLE)))
        for fd in handover.fds:
            os.set_inheritable(fd, False)
    return handover


def refuse(environ: Mapping[str, str], reason: str) -> None:
    """Tells the running daemon, if this process was to follow one, why it does not."""
    with suppress(HandoverError):
        handover = read(environ)
        if handover is not None:
            handover.refuse(reason)


def inherited_generation(handover: Handover, settings: Settings) -> tuple[int, bytes] | None:
    """(number, snapshot) to begin with, so that workers keep their ids and slots; None: begin anew.

    A snapshot that this version cannot read, or whose workers do not fit into `max_workers` any more, leaves only its
    number: no client is to see generations go backwards.
    """
    if handover.snapshot_fd < 0:
        return None
    data = leash.read_all(handover.snapshot_fd)
    os.close(handover.snapshot_fd)
    try:
        workers = snapshot_codec.decode(data).workers
        fits = all(worker.slot < settings.max_workers for worker in workers)
    except (msgspec.MsgspecError, ValueError):
        fits = False
    if not fits:
        data = snapshot_codec.encode(Snapshot(generation=handover.generation))
    return handover.generation, data


# --- the old side


class Successor:
    """The process that is to take over."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        """Takes over `channel`. Raises OSError when the process is gone already."""
        self.pid = pid
        self.channel = channel
        self.version = ""
        self.took: tuple[str, ...] = ()
        self._pidfd = os.pidfd_open(pid)

    def tell(self, message: Message) -> None:
        """If it is gone, its end of file says so."""
        with suppress(OSError):
            leash.send(self.channel, message)

    def wait(self, timeout_s: float) -> None:
        """Until its end."""
        select.select([self._pidfd], [], [], timeout_s)

    def kill(self) -> None:
        """Once, if it is not gone by now."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)


def start_successor(command: Sequence[str], environ: Mapping[str, str], handover: Handover) -> Successor:
    """`handover.channel_fd` is set here. Raises HandoverError."""
    ours, theirs = leash.pair()
    with theirs:
        whole = msgspec.structs.replace(handover, channel_fd=theirs.fileno())
        manifest_fd = leash.sealed_memfd("pointsman-handover", msgspec.json.encode(whole))
        try:
            pid = _spawn_orphan(command, {**environ, VARIABLE: str(manifest_fd)}, (manifest_fd, *whole.fds))
            return Successor(pid, ours)
        except OSError as error:
            ours.close()
            raise HandoverError(f"{command[0]} cannot be started: {error.strerror}") from None
        finally:
            os.close(manifest_fd)


def _spawn_orphan(command: Sequence[str], environ: Mapping[str, str], fds: Sequence[int]) -> int:
    """Returns the process id. Raises OSError."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _spawn_and_exit(command, environ, fds, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = int(pipe.read() or b"0")
    os.waitpid(child, 0)
    if answer <= 0:
        raise OSError(-answer, os.strerror(-answer))
    return answer


def _spawn_and_exit(command: Sequence[str], environ: Mapping[str, str], fds: Sequence[int], pipe: int) -> None:
    """In the child: writes a process id, or an error number below zero."""
    answer = -errno.EINVAL
    try:
        for fd in fds:
            os.set_inheritable(fd, True)
        handlers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE]
        answer = os.posix_spawn(command[0], list(command), environ, setsigdef=handlers, setsigmask=[])
    except OSError as error:
        answer = -(error.errno or errno.EINVAL)
    finally:
        with suppress(BaseException):
            os.write(pipe, str(answer).encode())
        os._exit(0)


# --- the new side


class Predecessor:
    """The daemon that this one follows."""

    def __init__(self, handover: Handover) -> None:
        self.pid = handover.pid
        self.version = handover.version
        self.generation = handover.generation
        """when this process was started"""
        self.channel = socket.socket(fileno=handover.channel_fd)
        self.channel.setblocking(False)
        self.has_been_told = ""
        """The last of standing_by, serving."""
        self.may_go = False
        self.floor = 0
        """Generations that its clients have seen since; 0 = none."""
        self.is_committed = False

    def tell(self, message: Message) -> None:
        """If it is gone, its end of file says so."""
        with suppress(OSError):
            leash.send(self.channel, message)

    def go(self, generation: int) -> None:
        """`generation`: what is in force there now, and will be the last."""
        self.may_go = True
        self.floor = generation if generation > self.generation else 0
