"""Workers that fail on command: TCP proxies between the gateway and real (or simulated) engines.

    with chaos(engine_urls) as fleet:
        fleet.plan("request-7", Cut(How.RESET), None)          # by request: the 1st attempt is reset, the 2nd is well
        fleet.workers[0].suffers(Trouble(Status(503), rate=0.3))       # by worker: a share of its requests
        with fleet.workers[1].refusing(): ...                          # by worker: its port is closed

Theory of operation. All proxies of a fleet run on one event loop in a thread of its own; tests program them and read
`attempts` from theirs (plain stores and appends, which CPython does not tear). A proxy needs to know only where a
*request* ends (the gateway always says Content-Length) and where an answer's head ends: one request at a time is on a
connection, so whatever comes after a request's last byte is the next request.

Which fault strikes a request: the next one of the plan for its X-Request-Id if there is one, whichever worker it came
to; otherwise the first trouble of this worker that strikes. Health probes, and whatever else is no POST, are spared.

The loop is asyncio's own: its transports write at once, so that bytes written before a reset are on their way when it
is sent; uvloop's would be dropped with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from tests.fakes.leeway import SLOW_MACHINE

READY_TIMEOUT_S = 10.0 * SLOW_MACHINE
SPLIT_S = 0.02
END_OF_EVENT = b"\n\n\r\n"
"""of a chunk that holds one event, as engines write them"""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
T = TypeVar("T")


# --- faults


class How(Enum):
    RESET = "reset"
    FIN = "fin"
    HANG = "hang"
    """Nothing more is said until the gateway closes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The answer ends: before its head, or in its body after so many events and then so many bytes (framing counts)."""

    how: How
    after_bytes: int | None = None
    after_events: int | None = None

    @property
    def is_in_body(self) -> bool:
        return self.after_bytes is not None or self.after_events is not None


@dataclass(frozen=True, slots=True)
class Delay:
    """The request reaches the engine that much later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drip:
    """The body comes `size` bytes at a time."""

    pause_s: float
    size: int = 1


@dataclass(frozen=True, slots=True)
class Status:
    """An answer of the worker's own; the engine does not see the request."""

    status: int
    retry_after: str | None = None
    body: bytes | None = None
    """None: an error as engines write it."""

    def wire(self) -> bytes:
        body = error_json(self.status) if self.body is None else self.body
        lines = [f"HTTP/1.1 {self.status} Chaos", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        if self.retry_after is not None:
            lines.append(f"Retry-After: {self.retry_after}")
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """A stream with status 200 whose first event is an error, as vLLM writes it."""

    status: int = 503
    split_at: int | None = None
    """That many bytes of the body come at first, the others a moment later."""

    def wires(self) -> tuple[bytes, bytes]:
        """What is written at first, and what later."""
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in self.events())
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = chunks + b"0\r\n\r\n"
        return head + body[: self.split_at], b"" if self.split_at is None else body[self.split_at :]

    def events(self) -> tuple[bytes, bytes]:
        return b"data: " + error_json(self.status) + b"\n\n", b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes in the place of an answer."""

    data: bytes = b"\x16\x03\x01 no HTTP at all\r\n\r\n"

    def wire(self) -> bytes:
        return self.data


Fault = Cut | Delay | Drip | Status | ErrorEvent | Garbage


def error_json(status: int) -> bytes:
    error = {"message": "chaos", "type": "server_error", "param": None, "code": status}
    return json.dumps({"error": error}).encode()


@dataclass(slots=True)
class Trouble:
    """A fault that strikes a worker's requests: a share of them, drawn with `seed`, at most so many `times`."""

    fault: Fault
    rate: float = 1.0
    times: int | None = None
    seed: int = 0
    struck: int = 0
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def strikes(self) -> bool:
        if self.times is not None and self.struck >= self.times:
            return False
        if self.rate < 1.0 and self._rng.random() >= self.rate:
            return False
        self.struck += 1
        return True


# --- what was seen


@dataclass(slots=True)
class Attempt:
    """One request as a worker read it."""

    worker: int
    request_id: str
    path: str
    body_sha256: str
    at: float
    """Monotonic clock, when it was complete."""
    fault: Fault | None
    closed_at: float = math.inf
    """When the gateway closed the connection, if this was the last request on it; infinite: it did not."""


# --- proxies


class ChaosWorker:
    """One proxy; `url` is what the gateway is told."""

    def __init__(self, fleet: ChaosFleet, index: int, engine_url: str) -> None:
        parts = urlsplit(engine_url)
        assert parts.hostname is not None and parts.port is not None
        self.fleet = fleet
        self.index = index
        self.engine_url = engine_url
        self.engine = parts.hostname, parts.port
        self.troubles: tuple[Trouble, ...] = ()
        self.accepted = 0
        self.connections: set[_GatewaySide] = set()
        self._resets_left = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    # --- for tests

    def suffers(self, *troubles: Trouble) -> None:
        """In place of those of before; none: the worker is well again."""
        self.troubles = troubles

    def resets_accepts(self, times: int) -> None:
        """The next `times` connections are reset as soon as they are accepted; some notice while they connect."""
        self._resets_left = times

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """As if its process had ended: what is open is reset, who connects is refused. The port stays taken."""
        self.fleet.run(self._refuse())
        try:
            yield
        finally:
            self.fleet.run(self.listen())

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """As if its host had gone: who connects hears nothing. What is open stays open."""
        self.fleet.run(self._stop_accepting())
        self._listener.listen(0)
        try:
            with _full_backlog(self._listener.getsockname()):
                yield
        finally:
            self.fleet.run(self.listen())

    # --- on the loop

    async def listen(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(1024)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        await self._stop_accepting()
        self._listener.close()
        for connection in tuple(self.connections):
            connection.reset()

    async def _refuse(self) -> None:
        address = self._listener.getsockname()
        await self.close()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(address)

    async def _stop_accepting(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        self.accepted += 1
        if self._resets_left > 0:
            self._resets_left -= 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.close()
        else:
            self.fleet.spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: _GatewaySide(self), sock)

    def fault_of(self, request_id: str, method: str) -> Fault | None:
        if method != "POST":
            return None
        planned = self.fleet.plans.get(request_id)
        if planned:
            return planned.popleft()
        return next((trouble.fault for trouble in self.troubles if trouble.strikes()), None)


@contextmanager
def _full_backlog(address: tuple[str, int]) -> Iterator[None]:
    """The kernel drops further SYNs while these wait to be accepted by nobody."""
    waiting: list[socket.socket] = []
    try:
        for _ in range(4):
            sock = socket.socket()
            waiting.append(sock)
            sock.settimeout(0.2)
            try:
                sock.connect(address)
            except TimeoutError:
                break
        else:
            raise AssertionError(f"the backlog of {address} does not fill")
        yield
    finally:
        for sock in waiting:
            sock.close()


class _GatewaySide(asyncio.Protocol):
    """A connection of the gateway, and the one to the engine that belongs to it."""

    def __init__(self, worker: ChaosWorker) -> None:
        self._worker = worker
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._buffer = b""
        self._attempt: Attempt | None = None
        self._engine: _EngineSide | None = None
        self._answer: _Answer | None = None

    # --- from the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._worker.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        line, *fields = head.decode("latin-1").split("\r\n")
        pairs = (field.partition(":") for field in fields)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        size = int(headers.get("content-length", "0"))
        if len(rest) < size:
            return
        assert len(rest) == size, "the gateway sent a request before it had the answer of the last one"
        wire, self._buffer = self._buffer, b""
        method, path, _ = line.split(" ")
        request_id = headers.get("x-request-id", "")
        fault = self._worker.fault_of(request_id, method)
        digest = hashlib.sha256(rest).hexdigest()
        self._attempt = Attempt(self._worker.index, request_id, path, digest, time.monotonic(), fault)
        if method == "POST":
            self._worker.fleet.attempts.append(self._attempt)
        self._strike(fault, wire)

    def pause_writing(self) -> None:
        if self._engine is not None:
            self._engine.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._engine is not None:
            self._engine.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.connections.discard(self)
        if self._attempt is not None:
            self._attempt.closed_at = time.monotonic()
        if self._engine is not None:
            self._engine.transport.abort()
        if self._answer is not None:
            self._answer.stop()

    # --- faults

    def _strike(self, fault: Fault | None, wire: bytes) -> None:
        match fault:
            case Status() | Garbage():
                self._transport.write(fault.wire())
            case ErrorEvent():
                first, rest = fault.wires()
                self._transport.write(first)
                if rest:
                    asyncio.get_running_loop().call_later(SPLIT_S, self._write, rest)
            case Cut() if not fault.is_in_body:
                self.end(fault.how)
            case Delay():
                self._forward(wire, None, fault.seconds)
            case _:
                self._forward(wire, fault)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _forward(self, wire: bytes, fault: Cut | Drip | None, delay_s: float = 0.0) -> None:
        self._answer = _Answer(self, self._transport, fault)
        self._worker.fleet.spawn(self._send_to_engine(wire, delay_s))

    async def _send_to_engine(self, wire: bytes, delay_s: float) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
        if self._engine is None or self._engine.transport.is_closing():
            loop = asyncio.get_running_loop()
            try:
                _, self._engine = await loop.create_connection(lambda: _EngineSide(self), *self._worker.engine)
            except OSError:
                self.end(How.RESET)
                return
        if self._transport.is_closing():
            self._engine.transport.abort()
        else:
            self._engine.transport.write(wire)

    def engine_said(self, data: bytes) -> None:
        if self._answer is not None and not self._transport.is_closing():
            self._answer.feed(data)

    def engine_left(self) -> None:
        self._transport.close()

    def end(self, how: How) -> None:
        if self._engine is not None:
            self._engine.gateway_side = None
            self._engine.transport.abort()
        if how is How.RESET:
            self.reset()
        elif how is How.FIN:
            self._forget_attempt()
            self._transport.close()

    def reset(self) -> None:
        self._forget_attempt()
        sock = cast("socket.socket", self._transport.get_extra_info("socket"))
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    def _forget_attempt(self) -> None:
        """We close, not the gateway."""
        self._attempt = None


class _EngineSide(asyncio.Protocol):
    def __init__(self, gateway_side: _GatewaySide) -> None:
        self.gateway_side: _GatewaySide | None = gateway_side
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.gateway_side is not None:
            self.gateway_side.engine_said(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.gateway_side is not None:
            self.gateway_side.engine_left()


class _Answer:
    """An engine's answer on its way to the gateway, as whole as its fault lets it be."""

    def __init__(self, side: _GatewaySide, out: asyncio.Transport, fault: Cut | Drip | None) -> None:
        self._side = side
        self._out = out
        self._fault = fault
        self._head = b""
        self._has_head = fault is None
        self._body = b""
        """Of a cut answer, all of it so far; of a dripping one, what has not dripped yet."""
        self._sent = 0
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, data: bytes) -> None:
        if self._is_over:
            return
        if not self._has_head:
            self._head += data
            head, blank, data = self._head.partition(b"\r\n\r\n")
            if not blank:
                return
            self._has_head = True
            self._out.write(head + blank)
        match self._fault:
            case None:
                self._out.write(data)
            case Cut():
                self._feed_cut(self._fault, data)
            case Drip():
                self._body += data
                if self._timer is None:
                    self._drip(self._fault)

    def stop(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def _feed_cut(self, cut: Cut, data: bytes) -> None:
        self._body += data
        end = _place_of(cut, self._body)
        self._out.write(self._body[self._sent : end])
        self._sent = len(self._body)
        if end is not None:
            self._is_over = True
            self._side.end(cut.how)

    def _drip(self, drip: Drip) -> None:
        self._timer = None
        if self._is_over or not self._body:
            return
        piece, self._body = self._body[: drip.size], self._body[drip.size :]
        self._out.write(piece)
        self._timer = asyncio.get_running_loop().call_later(drip.pause_s, self._drip, drip)


def _place_of(cut: Cut, body: bytes) -> int | None:
    """Where it ends, None while it is not reached."""
    place = 0
    for _ in range(cut.after_events or 0):
        found = body.find(END_OF_EVENT, place)
        if found < 0:
            return None
        place = found + len(END_OF_EVENT)
    place += cut.after_bytes or 0
    return place if len(body) >= place else None


# --- all of them


class ChaosFleet:
    """`workers` are the proxies, in the order of their engines."""

    def __init__(self, engine_urls: Sequence[str]) -> None:
        self.attempts: list[Attempt] = []
        """Every POST that a worker read in full, in order."""
        self.plans: dict[str, deque[Fault | None]] = {}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos", daemon=True)
        self.workers = [ChaosWorker(self, index, url) for index, url in enumerate(engine_urls)]

    @property
    def urls(self) -> list[str]:
        return [worker.url for worker in self.workers]

    def plan(self, request_id: str, *faults: Fault | None) -> None:
        """What the attempts of this request meet, in order, None: no fault. After the last: what the worker suffers."""
        self.plans[request_id] = deque(faults)

    def attempts_of(self, request_id: str) -> list[Attempt]:
        return [attempt for attempt in tuple(self.attempts) if attempt.request_id == request_id]

    def heal(self) -> None:
        """No fault any more, nothing seen so far."""
        self.plans = {}
        for worker in self.workers:
            worker.suffers()
            worker.resets_accepts(0)
        self.attempts.clear()

    # --- the loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(READY_TIMEOUT_S)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def start(self) -> None:
        self._thread.start()
        for worker in self.workers:
            self.run(worker.listen())

    def stop(self) -> None:
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(READY_TIMEOUT_S)
        self._loop.close()

    async def _close(self) -> None:
        for worker in self.workers:
            await worker.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted tell their protocols in the next turn


@contextmanager
def chaos(engine_urls: Sequence[str]) -> Iterator[ChaosFleet]:
    """A proxy before each of the engines."""
    fleet = ChaosFleet(engine_urls)
    fleet.start()
    try:
        yield fleet
    finally:
        fleet.stop()
