"""Real shard processes without supervisor and control: the test holds their leashes and the shared segment.

For tests of the relay: they start in a tenth of a second, take any settings, and every worker is up because the test
says so.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pointsman.config import settings as settings_codec
from pointsman.config import snapshot as snapshot_codec
from pointsman.config.settings import Settings
from pointsman.config.snapshot import MODEL_OTHER, Shared, Snapshot, WorkerSpec
from pointsman.daemon import leash
from pointsman.daemon.control.desired import default_retry, default_timeouts, shared_rules
from pointsman.daemon.leash import Message
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.supervisor.listeners import data_sockets
from tests.fakes.leeway import SLOW_MACHINE

TIMEOUT_S = 10.0 * SLOW_MACHINE


def worker_spec(slot: int, url: str, **fields: Any) -> WorkerSpec:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    return WorkerSpec(id=f"worker-{slot}", url=url, slot=slot, address=host, host=host, port=port, **fields)


class DataPlane:
    def __init__(self, shards: int, settings: Settings, log: Path, launcher: Sequence[str] = ()) -> None:
        self._launcher = launcher
        self.segment = Segment.create(shards, settings.max_workers)
        self.state = RoutingState.create(self.segment, IndexSize(4, 512), 2**26)
        self.log = log
        self._sockets = data_sockets(settings.host, 0, shards, 128)
        self.address: tuple[str, int] = self._sockets[0].getsockname()[:2]
        self.settings = settings
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._settings_fd = leash.sealed_memfd("settings", settings_codec.encode(settings))
        self.leashes: list[socket.socket] = []
        self.processes = [self._start(index) for index in range(shards)]
        self._generation = 0

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        ours, theirs = leash.pair()
        ours.setblocking(True)
        ours.settimeout(TIMEOUT_S)
        self.leashes.append(ours)
        fds = (self._settings_fd, self.segment.fd, self.state.index.fd, theirs.fileno(), self._sockets[index].fileno())
        names = ("--settings-fd", "--segment-fd", "--prefix-fd", "--leash-fd", "--listen-fd")
        command = [*self._launcher, sys.executable, "-m", "pointsman.daemon.shard", "--index", str(index)]
        command += [word for name, fd in zip(names, fds, strict=True) for word in (name, str(fd))]
        with self.log.open("ab") as output:
            process = subprocess.Popen(command, pass_fds=fds, stderr=output)
        theirs.close()
        return process

    def publish(self, *workers: WorkerSpec, is_up: bool = True, **fields: Any) -> int:
        """A new generation on all shards; its workers are up at once. Returns its number."""
        is_first = self._generation == 0
        self._generation += 1
        names = tuple(dict.fromkeys(name for worker in workers for name in worker.models))
        defaults: dict[str, Any] = {
            "default_retry": default_retry(self.settings),
            "default_timeouts": default_timeouts(self.settings),
            "shared": shared_rules(Shared(), self.settings),
        }
        models = (MODEL_OTHER, *names)
        snapshot = Snapshot(self._generation, workers=workers, models=models, **(defaults | fields))
        fd = leash.sealed_memfd("snapshot", snapshot_codec.encode(snapshot))
        for sock in self.leashes:
            leash.send(sock, Message("load", self._generation), fd)
        os.close(fd)
        self._expect("loaded")
        if is_up:
            for worker in workers:
                self.segment.set_status(worker.slot, at.STATUS_UP)
        self.segment.make_current(self._generation)
        if is_first:
            for sock in self.leashes:
                leash.send(sock, Message("serve"))
            self._expect("ready")
        return self._generation

    def _expect(self, kind: str) -> None:
        for sock in self.leashes:
            message, _ = leash.receive(sock)
            assert message is not None, "a shard ended"
            assert message.kind == kind, message

    def connect(self, shard: int | None = None) -> socket.socket:
        """A connection; to a certain shard by trying until its gauge of connections moves."""
        for _ in range(200):
            before = None if shard is None else self.segment.gauge(shard, at.G_CONNECTIONS)
            sock = socket.create_connection(self.address, timeout=TIMEOUT_S)
            if shard is None:
                return sock
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.recv(4096)
            if self.segment.gauge(shard, at.G_CONNECTIONS) != before:
                return sock
            sock.close()
        raise AssertionError(f"no connection reached shard {shard}")

    def in_flight(self) -> int:
        return sum(self.segment.inflight(slot) for slot in range(self.segment.layout.slots))

    def wait_until(self, what: str, holds: Any) -> None:
        """Poll shared memory until `holds()`; there is no event to wait for across processes."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            assert time.monotonic() < deadline, f"not in {TIMEOUT_S} s: {what}"
            select.select([], [], [], 0.005)

    def drain(self) -> None:
        self.segment.start_draining()
        for sock in self.leashes:
            leash.send(sock, Message("drain"))

    def stop(self) -> None:
        for sock in self.leashes:
            sock.close()
        for process in self.processes:
            process.wait(TIMEOUT_S)
        for sock in self._sockets:
            sock.close()
        os.close(self._settings_fd)
        os.close(self.segment.fd)

    def log_text(self) -> str:
        return self.log.read_text()


@contextmanager
def data_plane(
    shards: int = 2, workers: Sequence[str] = (), *, launcher: Sequence[str] = (), **settings: Any
) -> Iterator[DataPlane]:
    """`workers` are URLs of the first generation. `settings` override the defaults: those of `Settings`, but each
    request has one attempt and workers have no breakers. `launcher` is a command that runs the shards' ones."""
    with tempfile.TemporaryDirectory() as folder:
        base = Settings(
            runtime_dir=folder, state_dir=folder, shards=shards, disable_retries=True, disable_circuit_breaker=True
        )
        plane = DataPlane(shards, msgspec.structs.replace(base, **settings), Path(folder) / "shards.log", launcher)
        try:
            plane.publish(*(worker_spec(slot, url) for slot, url in enumerate(workers)))
            yield plane
        finally:
            plane.stop()
