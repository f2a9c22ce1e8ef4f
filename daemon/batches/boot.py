"""Puts the batch runner together, runs it until it is told to end, and takes it apart.

One runner at a time writes to the state directory: the one that holds the lock. In an upgrade the new daemon's waits
here until the old one's has ended; the shards, old and new, find whichever it is behind the same socket.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from pointsman.config import places
from pointsman.config.settings import Settings
from pointsman.daemon import leash
from pointsman.daemon.batches.api import Api, Quota
from pointsman.daemon.batches.dataport import DataPort, data_port_url
from pointsman.daemon.batches.ledger import Ledger
from pointsman.daemon.batches.live import LiveTraffic
from pointsman.daemon.batches.payloads import Payloads
from pointsman.daemon.batches.service import Service, make_parts
from pointsman.daemon.batches.shelf import Shelf
from pointsman.daemon.batches.tally import Tally
from pointsman.daemon.batches.validation import Limits
from pointsman.daemon.errors import EXIT_OK, EXIT_SOFTWARE
from pointsman.daemon.leash import Message
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.stores.open_store import open_store, sqlite_url
from pointsman.daemon.telemetry.logs import log

HEARTBEAT_S = 0.25
LOCK_RETRY_S = 0.1
STOP_GRACE_S = 5.0
"""what ends within it is kept; the rest runs again after the next start"""
SOCKET_MODE = 0o660
LEDGER = "ledger.db"
FILES = "files.db"
"""uploads and outputs, where the store is volatile"""


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the supervisor hands over."""

    settings: Settings
    segment: Segment
    leash: socket.socket


class BatchProcess:
    def __init__(self, inherited: Inherited) -> None:
        self._settings = inherited.settings
        self._segment = inherited.segment
        self._leash = inherited.leash
        self._stopped = asyncio.Event()
        self._folder = Path(inherited.settings.state_dir) / places.BATCH_DIR

    async def run(self) -> int:
        """Until the supervisor's word; returns the exit code. Raises what an unusable store or ledger raises."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopped.set)
        self._leash.setblocking(False)
        loop.add_reader(self._leash.fileno(), self._listen)
        self._beat()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with (self._folder / "lock").open("wb") as lock:
            if not await self._lock(lock.fileno()):
                return EXIT_OK
            return await self._serve()

    def _beat(self) -> None:
        self._segment.beat(self._segment.layout.batches)
        asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    def _listen(self) -> None:
        while True:
            try:
                message, _ = leash.receive(self._leash)
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is None:
                os._exit(EXIT_OK)  # the supervisor is gone; what is under way is run again
            if message.kind == "drain":
                self._stopped.set()

    async def _lock(self, fd: int) -> bool:
        """Waits for its turn; False: told to stop before it came."""
        is_told = False
        while not self._stopped.is_set():
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not is_told:
                    log("batches_wait", reason="another process has the state directory", path=str(self._folder))
                is_told = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), LOCK_RETRY_S)
        return False

    async def _serve(self) -> int:
        settings = self._settings
        assert settings.batch_store is not None
        shelf = Shelf(await asyncio.to_thread(Ledger, self._folder / LEDGER))
        files, results = await asyncio.to_thread(_open_stores, settings.batch_store, self._folder)
        internal = {"x-pointsman-internal": self._segment.internal_token.decode()}
        port = DataPort(data_port_url(settings), internal, settings.request_timeout_s)
        parts = make_parts(
            shelf,
            files,
            results,
            port,
            Tally(self._segment),
            Limits(settings.batch_max_lines, settings.max_payload_size),
            concurrency=settings.batch_concurrency,
            attempts=settings.batch_line_attempts,
        )
        service = Service(parts, int(settings.batch_ttl_s), LiveTraffic(self._segment).look)
        quota = Quota(
            settings.batch_max_file_mib << 20,
            settings.batch_quota_mib << 20,
            settings.batch_max_running,
            int(settings.batch_ttl_s),
        )
        await service.start()
        runner = web.AppRunner(Api(service, quota).app(), access_log=None, shutdown_timeout=STOP_GRACE_S)
        await runner.setup()
        await web.SockSite(runner, _listening(Path(settings.runtime_dir) / places.BATCH_SOCKET)).start()
        leash.send(self._leash, Message("ready"))
        log("batches_ready", store=settings.batch_store.partition(":")[0])
        try:
            return await self._until_end(service)
        finally:
            for site in list(runner.sites):
                await site.stop()
            await service.stop(STOP_GRACE_S)
            await runner.cleanup()
            await port.close()
            await asyncio.to_thread(shelf.close)
            for payloads in parts.stores:
                await asyncio.to_thread(payloads.close)

    async def _until_end(self, service: Service) -> int:
        service.failed.add_done_callback(lambda _: self._stopped.set())
        await self._stopped.wait()
        return EXIT_SOFTWARE if service.failed.done() else EXIT_OK  # the supervisor starts another one


def _open_stores(url: str, folder: Path) -> tuple[Payloads, Payloads]:
    """For files and for results. Raises what `open_store` raises.

    A result that is lost is computed again. A file cannot be, so it is kept on disk where a store would lose it.
    """
    store = open_store(url)
    results = Payloads(store)
    if not store.backend.is_volatile:
        return results, results
    return Payloads(open_store(sqlite_url(folder / FILES))), results


def _listening(path: Path) -> socket.socket:
    """Whoever had this path before has ended: the lock is ours."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~SOCKET_MODE)
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)
    return sock
