"""The parent's side of the child process: starting it, one call, and getting rid of it when it hangs.

    stopped → importing → setting up → ready → lost → (next call) importing …

A call that gets no answer within its time kills the child: a client that hangs is not worth waiting for, and nobody
knows when it would touch the shared memory again. All other calls under way then fail too and are sent again. Whoever
needs the child next starts it anew, on fresh sockets and fresh shared memory.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import msgspec

from pointsman.daemon.interpreter import interpreter_flags
from pointsman.daemon.stores.mooncake_wire import Reply, Request, Setup, Started, receive, send
from pointsman.daemon.stores.problems import missing_package
from pointsman.daemon.telemetry.logs import log

IMPORT_TIMEOUT_S = 20.0
SETUP_TIMEOUT_S = 15.0
ARENA_BYTES = 40 * 1024 * 1024
"""of a lane at first; only pages that were used take memory"""
MAX_IDLE_ARENA_BYTES = 64 * 1024 * 1024
_WORDS_BYTES = 4000
_STOP_TIMEOUT_S = 3.0

ENVIRONMENT = {
    "MC_RPC_TIMEOUT_MS": "2000",
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
    "MC_TCP_STATUS_TIMEOUT_SEC": "3",
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
}
"""Without them a call to a hung peer lasts 30 s and a setup without a master never ends. What is already set stays."""


class ChildError(Exception):
    """The call has no answer; `code` says why: child_hung, child_died, setup_failed, lanes_busy, closed."""

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(code)


class Lane:
    """One call's socket and memory."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.memory = os.fdopen(os.memfd_create("pointsman-store"), "r+b", buffering=0)
        self._arena = self._map(ARENA_BYTES)

    @property
    def arena_bytes(self) -> int:
        return len(self._arena)

    def reserve(self, size: int) -> memoryview:
        """At least so many bytes. Views of an earlier call must be released."""
        is_oversized = self.arena_bytes > MAX_IDLE_ARENA_BYTES and size <= ARENA_BYTES
        if size > self.arena_bytes or is_oversized:
            self._arena.close()
            self._arena = self._map(max(ARENA_BYTES, size))
        return memoryview(self._arena)

    def call(self, request: Request, timeout_s: float) -> Reply:
        """Raises OSError, TimeoutError among them: the child is of no use then."""
        self.sock.settimeout(timeout_s)
        send(self.sock, request)
        reply = receive(self.sock, Reply, timeout_s)
        if len(reply.numbers) != len(request.keys):
            raise OSError("an answer of another length")
        return reply

    def close(self) -> None:
        self.sock.close()
        self.theirs.close()
        with suppress(BufferError):  # a view of a call that is being unwound; the mapping goes with it
            self._arena.close()
        self.memory.close()

    def _map(self, size: int) -> mmap.mmap:
        os.ftruncate(self.memory.fileno(), size)
        return mmap.mmap(self.memory.fileno(), size)


class _Child:
    """One life of the process."""

    def __init__(self, setup: Setup, lanes: int, environment: Mapping[str, str]) -> None:
        self.lanes = [Lane() for _ in range(lanes)]
        self.idle: list[Lane] = []
        self.is_set_up = False
        self.is_lost = False
        self._words = b""
        leash, ours = os.pipe()
        said, stderr = os.pipe()
        self._leash = os.fdopen(ours, "wb", buffering=0)
        self._said = os.fdopen(said, "rb", buffering=0)
        # A client that logs more than anybody reads must not wait for a reader: what does not fit is dropped.
        os.set_blocking(stderr, False)
        os.set_blocking(said, False)
        command = [sys.executable, *interpreter_flags(), "-m", "pointsman.daemon.stores.mooncake_child"]
        command += ["--parent", str(os.getpid()), "--leash-fd", str(leash)]
        command += ["--setup", msgspec.json.encode(setup).decode()]
        for lane in self.lanes:
            command += ["--lane", f"{lane.theirs.fileno()}:{lane.memory.fileno()}"]
        fds = [leash, *(fd for lane in self.lanes for fd in (lane.theirs.fileno(), lane.memory.fileno()))]
        try:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=fds
            )
        finally:
            os.close(leash)
            os.close(stderr)
            for lane in self.lanes:
                lane.theirs.close()

    def wait_imported(self) -> str:
        """The problem of the import, or "". Raises OSError when the child dies or says nothing."""
        return receive(self.lanes[0].sock, Started, IMPORT_TIMEOUT_S).problem

    def wait_set_up(self) -> int:
        """What the client's `setup` returned. Raises OSError when the child dies or says nothing."""
        code = receive(self.lanes[0].sock, Started, SETUP_TIMEOUT_S).code
        self.is_set_up = code == 0
        self.idle = list(self.lanes)
        return code

    def last_words(self) -> str:
        """The end of what it wrote to standard error so far."""
        while said := self._said.read(1 << 16):
            self._words = (self._words + said)[-_WORDS_BYTES:]
        return self._words.decode(errors="replace")

    def end(self, *, in_order: bool) -> None:
        """In order: by end of file on the leash. Lanes that are in use are closed by who uses them."""
        self._leash.close()
        if in_order:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT_S)
        self.process.kill()
        self.process.wait()
        for lane in self.idle if self.is_set_up else self.lanes:
            lane.close()
        self.idle = []

    def forget(self) -> None:
        self._said.close()


class MooncakeProcess:
    """At most one child at a time, `lanes` calls side by side, all methods from any thread.

    `environment` is added to the process' own, over ENVIRONMENT. Raises BackendMissingError when the client cannot be
    loaded; that it cannot reach its master shows in the calls.
    """

    def __init__(
        self, setup: Setup, *, lanes: int, watchdog_s: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._setup = setup
        self._lane_count = lanes
        self._watchdog_s = watchdog_s
        bound = {"MC_TCP_BIND_ADDRESS": setup.local_hostname}
        self._environment = {**ENVIRONMENT, **bound, **os.environ, **(environment or {})}
        # The kernel takes the end of the *thread* that made a child for the end of its parent: this one stays.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="store-spawner")
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        self._child: _Child | None = None
        self._is_closed = False
        self.starts = 0
        self._spawn()

    @property
    def pid(self) -> int | None:
        """Of the child, if there is one now."""
        child = self._child
        return child.process.pid if child and not child.is_lost else None

    def last_words(self) -> str:
        child = self._child
        return child.last_words() if child and not child.is_lost else ""

    @contextmanager
    def lane(self, timeout_s: float) -> Iterator[Lane]:
        """For one batch. An OSError in the body ends the child, and comes out as ChildError."""
        deadline = time.monotonic() + timeout_s
        child = self._ready(deadline)
        with self._changed:
            if not self._changed.wait_for(lambda: child.idle or child.is_lost, deadline - time.monotonic()):
                raise ChildError("lanes_busy")
            if child.is_lost:
                raise ChildError("child_died")
            lane = child.idle.pop()
        try:
            yield lane
        except OSError as error:
            code = "child_hung" if isinstance(error, TimeoutError) else "child_died"
            self._lose(child, code)
            raise ChildError(code) from error
        finally:
            self._give_back(child, lane)

    def _give_back(self, child: _Child, lane: Lane) -> None:
        with self._changed:
            if child.is_lost:
                lane.close()
            else:
                child.idle.append(lane)
            self._changed.notify_all()

    def time_for(self, left_s: float) -> float:
        """How long one call may take: half of what is left, so that another try fits in.

        A child that holds data of its own is not killed for a caller's haste.
        """
        return self._watchdog_s if self._setup.global_segment_size else min(self._watchdog_s, max(left_s / 2, 1.0))

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
        with self._starting:
            if self._child is not None:
                self._lose(self._child, "closed")
        self._spawner.shutdown()

    def _ready(self, deadline: float) -> _Child:
        if not self._starting.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ChildError("starting")
        try:
            if self._is_closed:
                raise ChildError("closed")
            if self._child is None or self._child.is_lost:
                self._spawn()
            assert self._child is not None
            if not self._child.is_set_up:
                self._finish_setup(self._child)
            return self._child
        finally:
            self._starting.release()

    def _spawn(self) -> None:
        child = self._spawner.submit(_Child, self._setup, self._lane_count, self._environment).result()
        self.starts += 1
        try:
            problem = child.wait_imported()
        except OSError as error:
            self._lose(child, "import_failed")
            raise ChildError("import_failed") from error
        if problem:
            child.end(in_order=False)
            child.forget()
            self._spawner.shutdown()
            raise missing_package("mooncake", "mooncake", problem, also=_ALSO_NEEDED)
        self._child = child

    def _finish_setup(self, child: _Child) -> None:
        try:
            code = child.wait_set_up()
        except OSError as error:
            self._lose(child, "setup_failed")
            raise ChildError("setup_failed") from error
        if code != 0:
            self._lose(child, "setup_failed", setup_code=code)
            raise ChildError("setup_failed")

    def _lose(self, child: _Child, reason: str, **fields: object) -> None:
        with self._changed:
            if child.is_lost:
                return
            child.is_lost = True
            self._changed.notify_all()
        child.end(in_order=reason == "closed")
        if reason != "closed":
            log("store_child_lost", "warning", reason=reason, said=child.last_words()[-1000:], **fields)
        child.forget()


_ALSO_NEEDED = "; on Debian also: apt-get install libibverbs1"
