"""A data process: accepts on the sockets that it inherits, relays, and knows nothing but its memory.

Started by the supervisor, which tells it over the leash what to load, when to serve and when to stop. It reads no
file, binds nothing and resolves nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Container, Coroutine
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import uvloop

from pointsman.config import settings as settings_codec
from pointsman.config import snapshot as snapshot_codec
from pointsman.config.snapshot import Snapshot, TlsMaterial
from pointsman.config.tls_contexts import server_context
from pointsman.daemon import leash
from pointsman.daemon.errors import EXIT_BOOT_FAILED, EXIT_OK
from pointsman.daemon.leash import Message
from pointsman.daemon.relay.client import ClientConnection
from pointsman.daemon.relay.context import ShardContext
from pointsman.daemon.relay.exchange import Exchange
from pointsman.daemon.relay.listener_tls import ListenerTls
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.log_settings import LogSettings
from pointsman.daemon.shm.native import die_with_parent, keep_freed_memory, name_process
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import follow_level, log

HEARTBEAT_S = 0.25
POPULATE_BYTES, POPULATE_S = 1 << 20, 0.01
"""so much of the prefix index is mapped at once (0.2 ms), so often"""
BEATS_PER_SWEEP = 4
"""no timer of its own: an idle daemon's cost is its wake-ups"""
DRAIN_POLL_S = 0.02
CROSSING_S = 0.1
"""while the daemon stops: how long a connection must have been idle to be closed"""
RETIRED_IDLE_S = 5.0
"""after an upgrade nobody waits: whoever asks again in this time is told `Connection: close` with the answer, and does
not see the connection end while the next request is on its way"""
KEPT_HEAP_BYTES = 1 << 24
MAPPED_BLOCK_BYTES = 1 << 20
TLS_HELLO_S = 3.0
"""how long a process that ends waits for a client in its handshake"""
TLS_GOODBYE_S = 1.0
"""how long a client may take to say that it has seen the end of a TLS connection"""
GC_THRESHOLD = 20_000
"""a request makes no reference cycles; the collector is for the rare ones that errors leave"""


@dataclass(frozen=True, slots=True)
class Listening:
    sockets: tuple[socket.socket, ...]
    outlives_us: bool
    """systemd's (socket activation): connections wait in them while the daemon restarts"""


class Shard:
    def __init__(self, index: int, context: ShardContext, tables: Tables, channel: socket.socket, listening: Listening):
        self.index = index
        self.context = context
        self.segment = context.segment
        self.loop = context.loop
        self._tables = tables
        self._channel = channel
        self._listening = listening
        self._servers: list[asyncio.Server] = []
        self._tls: ListenerTls | None = None
        self._shuts_listeners = False
        self._ends_by = inf
        """the moment when what still runs is cut, once something was said about it"""
        self._idle_s = CROSSING_S
        self._beats = 0
        self._stopped = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        self._beat()
        self.loop.add_reader(self._channel.fileno(), self._messages)
        self.loop.add_signal_handler(signal.SIGTERM, self.drain)
        await self._stopped.wait()
        self.context.upstreams.close()
        self.context.flush_log()

    # --- periodic

    def _beat(self) -> None:
        self.segment.beat(self.index)
        self.context.pausing.notice()
        self.loop.call_later(HEARTBEAT_S, self._beat)
        self._end_drained()
        if self._beats % BEATS_PER_SWEEP == 0:
            self._sweep()
        self._beats += 1

    def _end_drained(self) -> None:
        """What still runs at workers whose drain has come to its deadline. Nobody has to tell us."""
        if not self.context.connections:
            return
        slots = self.segment.words.closing(self.index, int(self.context.now() * 1000))
        if not slots:
            return
        for connection in list(self.context.connections):
            exchange = connection.exchange
            if isinstance(exchange, Exchange) and _needs(exchange, slots):
                exchange.end_drained()

    def _sweep(self) -> None:
        now = self.context.now()
        for connection in list(self.context.connections):
            connection.check_deadlines(now)
        self.context.upstreams.close_idle(now - self.context.settings.pool_idle_timeout_s)
        self.context.router.settle(now)

    # --- the supervisor's word

    def _messages(self) -> None:
        while True:
            try:
                message, fd = leash.receive(self._channel)
            except BlockingIOError:
                return
            except OSError:
                message, fd = None, None
            if message is None:
                os._exit(EXIT_OK)  # the supervisor is gone, and with it the sockets: nothing left to serve
            if message.kind == "load" and fd is not None:
                self._load(message.generation, fd)
            elif message.kind == "serve":
                self._spawn(self._serve())
            elif message.kind == "drain":
                self._shuts_listeners = not self._listening.outlives_us
                self.drain(message.timeout_s)
            elif message.kind == "retire":
                self.retire(message.timeout_s)

    def _tell(self, message: Message) -> None:
        try:
            leash.send(self._channel, message)
        except OSError:
            os._exit(EXIT_OK)

    def _load(self, generation: int, fd: int) -> None:
        try:
            self._tables.add(snapshot_codec.decode(leash.read_all(fd)), current=self.segment.generation)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the old generation must go on
            log("snapshot_refused", level="error", shard=self.index, generation=generation, reason=str(error))
            self._tell(Message("failed", generation, str(error)[:500]))
            return
        finally:
            os.close(fd)
        self.segment.set_process(self.index, at.P_LOADED, generation)
        self._tell(Message("loaded", generation))

    async def _serve(self) -> None:
        if not self._servers:
            self.context.table()
            backlog, secured = self.context.settings.backlog, self._secured()
            self._servers = [
                await self.loop.create_server(
                    lambda: cast(asyncio.Protocol, ClientConnection(self.context)),
                    sock=sock,
                    backlog=backlog,
                    **secured,
                )
                for sock in self._listening.sockets
            ]
            gc.collect()
            gc.set_threshold(GC_THRESHOLD)
            gc.freeze()  # what the start built lives as long as the process: never walk it again
            self._populate(0)
        self._tell(Message("ready"))

    def _populate(self, start: int) -> None:
        """Map the prefix index little by little, each step shorter than a request."""
        index = self.context.router.index
        if start < len(index.memory):
            index.populate(start, min(POPULATE_BYTES, len(index.memory) - start))
            self.loop.call_later(POPULATE_S, self._populate, start + POPULATE_BYTES)

    def _secured(self) -> dict[str, Any]:
        """How the listeners speak TLS, if they do."""
        settings = self.context.settings
        if settings.tls_cert is None:
            return {}
        self._tls = ListenerTls(lambda: self._tables.tls(self.segment.generation), self.context.now)
        return {
            "ssl": self._tls,
            "ssl_handshake_timeout": settings.header_timeout_s,
            "ssl_shutdown_timeout": TLS_GOODBYE_S,
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log("shard_failed", level="error", shard=self.index, reason=repr(error))
            os._exit(EXIT_BOOT_FAILED)

    # --- stopping

    def drain(self, grace_s: float = 0.0) -> None:
        """Answers say `Connection: close` from now on; accept for `drain_delay_s`, then finish what runs.

        `grace_s`: 0 = `shutdown_grace_s`.
        """
        settings = self.context.settings
        self._begin_drain(settings.drain_delay_s, grace_s or settings.shutdown_grace_s, CROSSING_S)
        self.context.is_draining = True

    def retire(self, grace_s: float) -> None:
        """Another daemon accepts on the same sockets: as `drain`, without a delay and without being less ready.

        May be said again, with less grace.
        """
        self._begin_drain(0.0, grace_s, CROSSING_S if self.context.is_retired else RETIRED_IDLE_S)
        self.context.is_retired = True

    def _begin_drain(self, delay_s: float, grace_s: float, idle_s: float) -> None:
        self._ends_by = min(self._ends_by, time.monotonic() + delay_s + grace_s)
        self._idle_s = idle_s
        if not (self.context.is_draining or self.context.is_retired):
            self._spawn(self._drain(delay_s))

    async def _drain(self, delay_s: float) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
        for _ in range(2):  # let the loop accept what already waits in the queue
            await asyncio.sleep(0)
        self._stop_accepting()
        await asyncio.sleep(0)
        while self.context.connections or self._has_handshakes():
            for connection in list(self.context.connections):
                connection.close_if_idle(self.context.now(), self._idle_s)
            if time.monotonic() > self._ends_by:
                await self._cut_all()
                break
            await asyncio.sleep(DRAIN_POLL_S)
        self._stopped.set()

    def _has_handshakes(self) -> bool:
        return self._tls is not None and self._tls.has_handshakes(self.context.now() - TLS_HELLO_S)

    def _stop_accepting(self) -> None:
        if self._servers and self._shuts_listeners:
            # The supervisor holds these sockets too: merely closed, they would let clients connect and hang.
            for sock in self._listening.sockets:
                sock.shutdown(socket.SHUT_RDWR)
        for server in self._servers:
            server.close()

    async def _cut_all(self) -> None:
        for connection in list(self.context.connections):
            if connection.exchange is not None:
                connection.exchange.shut_down()
            else:
                connection.transport.abort()
        await asyncio.sleep(DRAIN_POLL_S)  # what was written reaches the kernel


def _needs(exchange: Exchange, slots: Container[int]) -> bool:
    """Whether it cannot go on without one of these workers."""
    if exchange.booked is not None and exchange.booked.slot in slots:
        return True
    return exchange.pair is not None and exchange.pair.prefill_slot in slots


class Tables:
    """The compiled generations from the current one on; a running request holds on to its own."""

    def __init__(self) -> None:
        self._by_generation: dict[int, RoutingTable] = {0: RoutingTable(Snapshot(generation=0))}
        self._tls: dict[int, ssl.SSLContext] = {}

    def add(self, snapshot: Snapshot, *, current: int) -> None:
        """Raises RequestError or TlsError for a snapshot that cannot be used."""
        table = RoutingTable(snapshot)
        if snapshot.tls is not None:
            self._tls[snapshot.generation] = self._context(snapshot.tls)
        self._by_generation[snapshot.generation] = table
        for old in [generation for generation in self._by_generation if generation < current]:
            del self._by_generation[old]
            self._tls.pop(old, None)

    def _context(self, material: TlsMaterial) -> ssl.SSLContext:
        """The one that is there, if the material is the same: its session tickets go on being good."""
        for generation, context in self._tls.items():
            if self._by_generation[generation].snapshot.tls == material:
                return context
        return server_context(material)

    def tls(self, generation: int) -> ssl.SSLContext:
        """Raises SSLError, which ends the handshake, when the generation has no certificate (yet)."""
        try:
            return self._tls[generation]
        except KeyError:
            raise ssl.SSLError(f"no certificate in generation {generation}") from None

    def __call__(self, generation: int) -> RoutingTable:
        return self._by_generation[generation]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pointsman.daemon.shard")
    for name in ("index", "settings-fd", "segment-fd", "prefix-fd", "leash-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--listen-fds", required=True)
    parser.add_argument("--listeners-outlive-us", action="store_true")
    return parser.parse_args(argv)


async def _main(arguments: argparse.Namespace) -> None:
    channel = socket.socket(fileno=arguments.leash_fd)
    channel.setblocking(False)
    sockets = tuple(socket.socket(fileno=int(fd)) for fd in arguments.listen_fds.split(","))
    settings = settings_codec.decode(leash.read_all(arguments.settings_fd))
    state = RoutingState.attach(Segment.attach(arguments.segment_fd), arguments.prefix_fd)
    follow_level(LogSettings(state.segment))
    tables = Tables()
    loop = asyncio.get_running_loop()
    # the segment may already be generations ahead of what this process has loaded
    context = ShardContext(settings, state, arguments.index, loop, tables)
    listening = Listening(sockets, outlives_us=arguments.listeners_outlive_us)
    await Shard(arguments.index, context, tables, channel, listening).run()


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    die_with_parent(signal.SIGKILL)
    name_process(f"pointsman-s{arguments.index}")
    keep_freed_memory(KEPT_HEAP_BYTES, MAPPED_BLOCK_BYTES)
    for ignored in (signal.SIGINT, signal.SIGHUP):  # a terminal's, meant for the supervisor
        signal.signal(ignored, signal.SIG_IGN)
    try:
        uvloop.run(_main(arguments))
    except Exception as error:  # noqa: BLE001 - tell the supervisor that trying again is useless
        log("shard_boot_failed", level="error", shard=arguments.index, reason=repr(error))
        return EXIT_BOOT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
