"""Puts control together, runs it until it is told to end, and takes it apart.

In an upgrade two of them overlap, but only one writes to the state directory and answers the admin API. The new one
stands by until the other has yielded: all is read, the workers are asked, a generation is published to its own shards.
Then it takes the lock, reads again what the other one may have written meanwhile, and opens the admin API.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from pointsman.admin_api.changes import Changes
from pointsman.config import snapshot as codec
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.config.tls_contexts import WorkerTrust
from pointsman.config.watch import watch
from pointsman.daemon import leash
from pointsman.daemon.control import admin, files, recalling, restore
from pointsman.daemon.control.catalog import Catalog
from pointsman.daemon.control.channel import Channel
from pointsman.daemon.control.config_state import ConfigState
from pointsman.daemon.control.decisions import Decisions
from pointsman.daemon.control.desired import compile_snapshot
from pointsman.daemon.control.drain import Drainer
from pointsman.daemon.control.explaining import Explainer
from pointsman.daemon.control.fanning import Fanning
from pointsman.daemon.control.historian import Historian
from pointsman.daemon.control.pausing import Pauser
from pointsman.daemon.control.publisher import RETRY_S, NotPublished, Publisher
from pointsman.daemon.control.recording import Recorder
from pointsman.daemon.control.reload import Reloader
from pointsman.daemon.control.residency import Residency
from pointsman.daemon.control.saving import ALONE, BESIDE_SHARDS, StateSaver
from pointsman.daemon.control.service import ControlService
from pointsman.daemon.control.tasks import Tasks
from pointsman.daemon.control.upgrading import Upgrader
from pointsman.daemon.errors import EXIT_OK, EXIT_SOFTWARE, PointsmanError
from pointsman.daemon.leash import Message
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.address import rules as address_rules
from pointsman.daemon.workers.locate import Locator
from pointsman.daemon.workers.probe import ProbeClient
from pointsman.daemon.workers.prober import Prober, Surroundings
from pointsman.daemon.workers.registry import Registry, Worker
from pointsman.daemon.workers.scraper import Scraper
from pointsman.daemon.workers.state import WorkerState

PULSE_S = 0.1
"""heartbeat, and the prober's turn; one timer for both, because an idle daemon's cost is its wake-ups"""
WELCOME_S = 10.0
FINISH_CHANGES_S = 4.0
"""for changes under way when another daemon takes over"""
FIRST_PROBES_S = 2.0
"""how long a start waits for workers that do not answer"""
FIRST_PAGES_S = 1.0
"""how long a start waits for engines to show that they are those that were known"""


class BootError(PointsmanError):
    """Control cannot start; the message says why."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the supervisor hands over."""

    settings: Settings
    state: RoutingState
    leash: socket.socket
    admin: Sequence[socket.socket]
    """listening already, in the order of `settings.admin_listen`, then of `settings.metrics_listen`"""
    data_ports: Sequence[int]
    """which the shards accept on; more than one only if systemd passes several sockets"""


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the supervisor says first."""

    last: Snapshot | None
    """The snapshot that it holds; None at a first start."""
    stands_by: bool
    floor: int

    @classmethod
    def read(cls, message: Message, fd: int | None) -> Welcome:
        last = None
        if fd is not None:
            try:
                last = codec.decode(leash.read_all(fd))
            finally:
                os.close(fd)
        return cls(last, message.stands_by, message.floor)


class Control:
    def __init__(self, inherited: Inherited, state: WorkerState) -> None:
        self._settings = inherited.settings
        self._routing = inherited.state
        self._segment = inherited.state.segment
        self._admin_sockets = inherited.admin
        self._data_ports = inherited.data_ports
        self._channel = Channel(inherited.leash)
        self._state = state
        self._background = Tasks()
        """what a drain stops"""
        self._vital = Tasks()
        """what runs until the end"""
        self._is_probing = False
        self._changes = Changes()
        self._has_yielded = False
        self._ended = asyncio.Event()
        self._is_filled = asyncio.Event()
        """from here on a reload finds what it changes, and somebody who publishes it"""
        self._stop_watching = asyncio.Event()

    async def run(self) -> int:
        """Until SIGTERM; returns the exit code. Raises PointsmanError when it cannot start."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ended.set)
        self._pulse()
        self._channel.open()
        trust = WorkerTrust(lambda: self._reloader.access.worker_ca)
        client = ProbeClient.open(self._settings.health_timeout_s, trust)
        try:
            welcome = await self._greet()
            if not welcome.stands_by:
                await self._own_state()
            service = self._assemble(welcome.last, client)
            reached = await self._historian.load()
            if welcome.last is None:  # generations go on counting where the last daemon stopped
                self._publisher.outrun(reached)
            await self._start(service, welcome)
            return await self._until_end()
        finally:
            await self._background.stop()
            await self._vital.stop()
            await client.close()

    # --- start

    async def _greet(self) -> Welcome:
        answer: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._channel.on("welcome", lambda message, fd: answer.set_result(Welcome.read(message, fd)))
        self._channel.send(Message("hello"))
        try:
            async with asyncio.timeout(WELCOME_S):
                return await answer
        except TimeoutError:
            raise BootError(f"no welcome from the supervisor within {WELCOME_S:g} s") from None

    async def _own_state(self) -> None:
        """Raises StateError when another daemon has it."""
        await asyncio.to_thread(self._state.lock)

    def _assemble(self, last: Snapshot | None, client: ProbeClient) -> ControlService:
        settings, segment = self._settings, self._segment
        self._registry = registry = Registry(segment.layout.slots, lambda: str(uuid4()), settings.workers_file)
        rules = address_rules(settings.worker_networks, self._own_ports())
        self._locator = locator = Locator(rules, registry.pinned)
        self._scraper = scraper = Scraper(segment, client, self._background.spawn, self._engine_restarted)
        around = Surroundings(self._background.spawn, locator.resolve, self._publish_found)
        self._prober = Prober(settings, segment, client, around, scraper, self._health_section)
        self._publisher = publisher = Publisher(self._channel, segment, last, self._compile, self._published)
        self._residency = Residency(self._routing, settings, lambda: publisher.current)
        self._saver = StateSaver(self._routing, settings, registry, scraper, self._residency)
        self._drainer = Drainer(self._routing, registry, lambda: publisher.current, self._slot_freed)
        catalog = Catalog(
            self._routing,
            registry,
            locator,
            self._prober,
            publisher,
            self._state,
            settings.workers_file,
            self._drainer.wake,
        )
        before = last or Snapshot(generation=0)
        config_state = ConfigState(self._state)
        self._reloader = Reloader(settings, registry, locator, before, config_state, catalog.settle, self._reload_soon)
        self._historian = Historian(self._reloader, config_state, files.paths(settings))
        recorder = Recorder(segment, settings.prefix_block_bytes, lambda: publisher.current.models)
        return ControlService(
            settings,
            self._routing,
            catalog,
            publisher,
            self._reloader,
            self._historian,
            recorder,
            self._residency,
            Explainer(self._routing, lambda: publisher.current),
            Decisions(self._routing, lambda: publisher.current.workers),
            Fanning(catalog, client, self._residency.forget),
            Upgrader(self._channel, segment, settings, self._upgrade_over),
            self._saver,
            Pauser(segment),
        )

    def _own_ports(self) -> frozenset[int]:
        names = [sock.getsockname() for sock in self._admin_sockets if sock.family != socket.AF_UNIX]
        return frozenset({*self._data_ports, *(name[1] for name in names)})

    async def _start(self, service: ControlService, welcome: Welcome) -> None:
        last = welcome.last
        go: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._channel.on("go", lambda message, _: go.set_result(message.floor))
        # The watch first: what is edited while the files are read is read again.
        self._background.keep("watch", self._watch)
        await asyncio.sleep(0)
        await restore.fill(
            self._settings, self._segment, self._registry, self._locator, self._state, self._reloader, last
        )
        self._channel.on("reload", lambda *_: self._background.spawn("reload", self._reloader.reload()))
        self._channel.on("drain", lambda *_: self._vital.spawn("drain", self._drain()))
        self._vital.keep("publisher", self._publisher.run)
        self._prober.track(self._registry.live())
        service.catalog.enforce_drains(self._registry.draining())
        self._is_filled.set()
        await self._publish_first()
        if last is None or welcome.stands_by:  # the segment knows of no worker whether it is up
            await self._prober.ask_all(min(FIRST_PROBES_S, self._settings.health_timeout_s))
        self._is_probing = True
        self._background.keep("slots", self._drainer.run)
        self._background.keep("prefix index", self._residency.run)
        floor = welcome.floor
        if welcome.stands_by:
            self._channel.send(Message("standing_by"))
            floor = await go
            await self._own_state()
            reached = await self._historian.load()
            if last is None or reached > last.generation:  # what was handed over may go on under its number
                floor = max(floor, reached)
        self._publisher.outrun(floor)
        if welcome.stands_by:
            for changes in (
                await restore.declare_stored(self._registry, self._locator, self._state),
                await self._reloader.recall(),
            ):
                with suppress(NotPublished):  # tried again below
                    await service.catalog.settle(changes)
            self._registry.recall_drains(self._state.load().drains)
            service.catalog.enforce_drains(self._registry.live())
        if last is None or welcome.stands_by:
            await self._recall()
        self._background.keep("saved state", self._saver.run)
        await self._publish_first()
        self._historian.published(self._publisher.current)
        self._background.keep("history", self._historian.run)
        self._servers = await admin.serve(service, self._settings, self._admin_sockets, self._changes)
        self._channel.on("yield", lambda *_: self._vital.spawn("yield", self._yield()))
        self._channel.send(Message("ready"))
        log("control_ready", generation=self._publisher.current.generation, workers=len(self._registry.live()))

    async def _recall(self) -> None:
        """What the daemon before this one had learned, as far as its engines are still there."""
        saved = await recalling.read_saved(self._settings)
        if saved is not None:
            await self._scraper.read_all(FIRST_PAGES_S)
            await recalling.recall(saved, self._settings, self._routing, self._registry, self._scraper)

    async def _publish_first(self) -> None:
        """However long the shards take to start: whether this takes too long is for the supervisor to judge."""
        while True:
            try:
                return await self._publisher.publish()
            except NotPublished as error:
                if error.is_final:
                    raise BootError(error.message) from None

    # --- run

    def _pulse(self) -> None:
        asyncio.get_running_loop().call_later(PULSE_S, self._pulse)
        self._segment.beat(self._segment.layout.control)
        if not self._is_probing:
            return
        try:
            self._prober.turn()
        except Exception as error:  # noqa: BLE001 - in a timer nobody else would notice
            self._is_probing = False
            self._vital.give_up("probes", error)

    async def _watch(self) -> None:
        paths = [Path(path) for path in files.paths(self._settings).values() if path is not None]
        if not paths:
            return
        async for _changed in watch(paths, self._stop_watching):
            await self._is_filled.wait()
            await self._reloader.reload()

    def _reload_soon(self) -> None:
        async def reload() -> None:
            await asyncio.sleep(RETRY_S)
            await self._reloader.reload()

        self._background.spawn("reload", reload())

    async def _publish_found(self) -> None:
        """What a probe found out. A refusal is logged where it happens, and tried again."""
        try:
            await self._publisher.publish()
        except NotPublished:
            return

    def _engine_restarted(self, worker: Worker, reason: str) -> None:
        async def forget() -> None:
            held = await self._residency.forget(worker.slot)
            log("cache_forgotten", worker=worker.url, reason=reason, chars=held)

        self._background.spawn(f"forget {worker.url}", forget())

    def _health_section(self) -> dict[str, Any]:
        return self._publisher.current.shared.health

    def _slot_freed(self) -> None:
        if self._reloader.lacks_slots:
            self._background.spawn("reload", self._reloader.reload())

    def _compile(self) -> Snapshot:
        known, reloader = self._publisher.current, self._reloader
        return compile_snapshot(
            self._registry.live(),
            reloader.rules,
            self._settings,
            known.models,
            reloader.access,
            known.key_names,
            self._historian.expect() or known.content,
        )

    def _published(self, snapshot: Snapshot) -> None:
        self._historian.published(snapshot)

    # --- stop

    async def _drain(self) -> None:
        """The daemon is stopping: no probes, no reloads, no new generations; the admin API goes on answering."""
        self._is_probing = False
        self._publisher.stop()
        self._stop_watching.set()
        await self._background.stop()

    async def _yield(self) -> None:
        """Another daemon takes over: it may write, and answer, from the moment when this is done."""
        await self._changes.close(FINISH_CHANGES_S)
        await self._drain()
        await self._servers.close_doors()
        await self._saver.save_last(BESIDE_SHARDS)
        await self._historian.flush()
        self._state.unlock()
        self._has_yielded = True
        self._channel.send(Message("yielded"))

    def _upgrade_over(self) -> None:
        """Done or not: without state and sockets there is nothing left to do here."""
        if self._has_yielded:
            self._ended.set()

    async def _until_end(self) -> int:
        """SIGTERM, or background work that fails again and again."""
        for owner in (self._background, self._vital):
            owner.gave_up.add_done_callback(lambda _: self._ended.set())
        await self._ended.wait()
        for owner in (self._background, self._vital):
            if owner.gave_up.done():
                log("control_gives_up", level="error", task=owner.gave_up.result())
                return EXIT_SOFTWARE  # the supervisor starts another one
        await self._drain()
        await self._servers.stop()
        if not self._has_yielded:  # else the state directory is another daemon's
            await self._saver.save_last(ALONE)
            await self._historian.flush()
        return EXIT_OK


async def run(inherited: Inherited, state: WorkerState) -> int:
    return await Control(inherited, state).run()
