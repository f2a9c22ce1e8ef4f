"""What the connections of one shard share: the compiled configuration in force, shared memory, pools, telemetry."""

from __future__ import annotations

import asyncio
import os
import time
from math import inf
from random import Random
from typing import TYPE_CHECKING, Protocol

from pointsman.config.settings import Settings
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.dispatch.router import LiveRouter
from pointsman.daemon.relay.access import text_line
from pointsman.daemon.relay.admitting import Admitting
from pointsman.daemon.relay.buffers import BodyBuffers
from pointsman.daemon.relay.elsewhere import Elsewhere
from pointsman.daemon.relay.ending import Ending
from pointsman.daemon.relay.guard import Guard
from pointsman.daemon.relay.pace import Pace
from pointsman.daemon.relay.pairs import Pairs
from pointsman.daemon.relay.pausing import Pausing
from pointsman.daemon.relay.request_lines import numbered
from pointsman.daemon.relay.routes import Route, build_routes
from pointsman.daemon.relay.upstream import UpstreamPools
from pointsman.daemon.relay.wheel import Wheel
from pointsman.daemon.routing.table import RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.explanations import ExplanationLog
from pointsman.daemon.shm.native import monotonic
from pointsman.daemon.shm.recording import RecordingLog
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.access_log import LineWriter
from pointsman.daemon.telemetry.key_counts import KeyCounts
from pointsman.daemon.telemetry.logs import PRIORITIES, is_journal
from pointsman.daemon.telemetry.series import Series

if TYPE_CHECKING:
    from pointsman.daemon.relay.client import ClientConnection


_H_PHASE, _PHASE_RUNNING, _H_PAUSE = at.H_PHASE, at.PHASE_RUNNING, at.H_PAUSE
_H_ACCESS_UNSAMPLED = at.H_ACCESS_UNSAMPLED
_COMPLETE = Ending.COMPLETE


class TableSource(Protocol):
    def __call__(self, generation: int) -> RoutingTable: ...


class ShardContext:
    def __init__(
        self, settings: Settings, state: RoutingState, shard: int, loop: asyncio.AbstractEventLoop, tables: TableSource
    ) -> None:
        segment = state.segment
        self.settings = settings
        self.segment = segment
        self.words = segment.words
        self.cells = segment.cells
        self.shard = shard
        self.loop = loop
        self.rng = Random()
        self.router = LiveRouter(state, shard, self.rng)
        self.short_way, self.chooser = self.router.short_way, self.router.chooser
        self.resilience = SharedResilience(state, shard)
        self.admitting = Admitting(self, self.resilience)
        self.pausing = Pausing(self)
        self.pairs = Pairs(self, state)
        self.wheel = Wheel(time.monotonic, loop.call_later)
        self.explanations = ExplanationLog(segment, shard)
        self.recording = RecordingLog(segment, shard)
        self._gauges = segment.layout.gauge(shard, 0)
        self.routes: dict[bytes, Route] = build_routes(settings.extra_paths)
        guard = Guard(settings)
        self.internal_token = segment.internal_token
        elsewhere = Elsewhere(settings)
        self.elsewhere = None if elsewhere.is_empty else elsewhere
        """None: the shards answer everything themselves"""
        self.guard = guard if guard.is_needed else None
        """None: whoever reaches the port may ask and steer"""
        self.series = Series(segment, shard)
        self.key_counts = KeyCounts(segment, shard)
        self.connections: set[ClientConnection] = set()
        self._answering: list[ClientConnection] = []
        self._call_soon, self._write_all = loop.call_soon, self._answer_all  # looked up once
        self.buffers = BodyBuffers(
            segment, shard, settings.buffer_mib << 20, settings.buffer_wait_s, loop.call_later, time.monotonic
        )
        self.upstreams = UpstreamPools(self, Pace(settings.stream_coalesce_us * 1e-6))
        self.is_draining = False
        """This shard alone was told to stop (the whole daemon's drain is in the segment)."""
        self.is_retired = False
        """Another daemon accepts on the same sockets."""
        self.max_headers = settings.max_headers
        self.max_header_bytes = settings.max_header_bytes
        self.max_payload_bytes = settings.max_payload_size
        self._tables = tables
        self._table = tables(0)
        self._generation = self._table.generation
        self._use(self._table)
        self.next_sample = 0.0 if settings.decision_sample_interval_s else inf
        """from then on the next decision is explained and kept"""
        self._wall_offset = time.time() - time.monotonic()
        self._requests = 0
        self._id_prefix = f"req-{os.urandom(6).hex()}-".encode()
        self._is_logging = settings.access_log
        self._is_text = settings.access_log_format == "text"
        self._line_start = PRIORITIES["info"] if is_journal(2) else b""
        self._log = LineWriter(2, loop.call_later, lambda n: self.count(at.G_LOG_DROPPED, n))

    def now(self) -> float:
        """time.monotonic(); the clock of everything here."""
        return monotonic()

    # --- configuration

    def table(self) -> RoutingTable:
        """The generation in force at this moment; a request keeps the one that it began with."""
        generation = self.words.generation()
        if generation != self._generation:
            self._table = self._tables(generation)
            self._generation = self._table.generation
            self.upstreams.keep_only(self._table.snapshot.workers)
            self._use(self._table)
        return self._table

    def _use(self, table: RoutingTable) -> None:
        self.resilience.use(table.breaker, table.admission)
        self.router.watch_breakers(self.resilience.breaker_width_s)

    def is_stopping(self) -> bool:
        return self.is_draining or self.words.get(_H_PHASE) != _PHASE_RUNNING

    def closes_connections(self) -> bool:
        return self.is_retired or self.is_stopping()

    def is_paused(self) -> bool:
        return self.words.get(_H_PAUSE) != 0

    # --- answers

    def answer_soon(self, connection: ClientConnection) -> None:
        """Whole answers of one turn of the event loop go out together, as requests do (`UpstreamPools.send_soon`)."""
        if not self._answering:
            self._call_soon(self._write_all)
        self._answering.append(connection)

    def _answer_all(self) -> None:
        answering, self._answering = self._answering, []
        for connection in answering:
            connection.write_answer()

    # --- explanations

    def may_explain(self, peer: str) -> bool:
        """Whether a client at this address may see how its request was routed."""
        allowed = self.settings.explain_header
        return allowed == "all" or (allowed == "local" and (peer in ("127.0.0.1", "::1", "")))

    def is_sample_due(self, now: float) -> bool:
        """At most one decision per interval is explained and kept, however many there are."""
        if now < self.next_sample:
            return False
        self.next_sample = now + self.settings.decision_sample_interval_s
        return True

    # --- telemetry

    def count(self, word: int, amount: int = 1) -> None:
        """Add to one of this shard's gauges or counters (layout.G_*)."""
        self.words.add(self._gauges + word, amount)

    def count_at(self, slot: int, word: int, amount: int = 1) -> None:
        """Add to one of this shard's gauges or counters of a worker (layout.L_*)."""
        self.words.add(self.segment.layout.load(self.shard, slot, word), amount)

    def wall_us(self, now: float) -> int:
        """Unix microseconds of a moment of `now()`."""
        return int((now + self._wall_offset) * 1e6)

    def new_request_id(self) -> bytes:
        self._requests += 1
        return numbered(self._id_prefix, self._requests)

    def is_line_due(self, status: int, ending: Ending) -> bool:
        """Whether a request gets its access line: with an error always, else as sampled."""
        if not self._is_logging:
            return False
        unsampled = self.words.get_real(_H_ACCESS_UNSAMPLED)
        return not unsampled or status >= 400 or ending is not _COMPLETE or self.rng.random() >= unsampled

    def log_line(self, line: bytes) -> None:
        """The access line of a request: a complete line of JSON, with its newline."""
        if self._is_text:
            line = text_line(line)
        self._log.line(self._line_start + line if self._line_start else line)

    def flush_log(self) -> None:
        self._log.flush()
