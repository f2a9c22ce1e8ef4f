"""Requests with their times: so many a second whatever becomes of them (an open loop), or so many clients in turn.

An open loop does not wait for answers before it asks again, so a gateway that slows down gets no relief: what users do.
Runs in a thread of its own; connections are kept alive and taken in turn. A sample is written when its request has
ended; none is missing after `stop`.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import uvloop

from tests.fakes.leeway import leeway
from tests.fakes.traffic import LAST_CHUNK

TICK_S = 0.004
END_TIMEOUT_S = 30.0
LOST = 0
"""Status of a request whose connection ended before its answer did."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Sample:
    sent: float
    ended: float
    """Monotonic clock."""
    status: int
    port: int
    """Of the client's end of the connection; 0: it was refused."""
    number: int
    """Of the request: what `wire` was given."""
    answer: bytes = b""
    """All that came of it, if answers are kept."""

    @property
    def took_s(self) -> float:
        return self.ended - self.sent


def share(samples: Iterable[float], quantile: float) -> float:
    """The value that this share of the samples does not exceed."""
    ordered = sorted(samples)
    assert ordered, "no samples"
    return ordered[min(math.ceil(len(ordered) * quantile), len(ordered)) - 1]


def statuses(samples: Iterable[Sample]) -> Counter[int]:
    return Counter(sample.status for sample in samples)


class _Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._buffer = b""
        self._needed = -1
        self._sent = 0.0
        self._is_asking = False
        self._port = 0
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._port = transport.get_extra_info("sockname")[1]

    def ask(self, number: int, sent: float) -> None:
        self._buffer, self._needed = b"", -1
        self._number, self._sent, self._is_asking = number, sent, True
        self._transport.write(self._load.wire(number))

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._needed == -1:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._buffer, 0, end + 2)
            self._needed = end + 4 + int(length[1]) if length else 0
        if len(self._buffer) >= self._needed if self._needed else self._buffer.endswith(LAST_CHUNK):
            self._ended(int(self._buffer[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost(self)
        if self._is_asking:
            self._ended(LOST)

    def _ended(self, status: int) -> None:
        self._is_asking = False
        answer = self._buffer if self._load.keeps_answers else b""
        self._load.ended(Sample(self._sent, time.monotonic(), status, self._port, self._number, answer))
        if status == LOST:
            return
        if _CLOSES.search(self._buffer, 0, 4096):
            self._transport.close()
        else:
            self._load.idle.append(self)


class Load:
    """`with Load(address, wire, per_s=480) as load:`, or `clients=32`; ends after `total` requests if that is given.

    `wire` makes the bytes of the n-th request.
    """

    def __init__(
        self,
        address: tuple[str, int],
        wire: Callable[[int], bytes],
        *,
        per_s: float = 0.0,
        clients: int = 0,
        total: int | None = None,
        keeps_answers: bool = False,
    ) -> None:
        assert (per_s > 0) != (clients > 0)
        self.samples: list[Sample] = []
        self.idle: list[_Connection] = []
        self.running = 0
        self._address = address
        self.wire = wire
        self.keeps_answers = keeps_answers
        self._per_s = per_s
        self._clients = clients
        self._total = total
        self._asked = 0
        self._is_stopping = False
        self._connecting: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, timeout_s: float = END_TIMEOUT_S) -> Sequence[Sample]:
        """No new requests; those that run are waited for."""
        self._is_stopping = True
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = END_TIMEOUT_S) -> Sequence[Sample]:
        """Until `total` requests have ended."""
        self._thread.join(timeout_s * leeway())
        assert not self._thread.is_alive(), f"{self.running} requests did not end in {timeout_s} s"
        return self.samples

    # --- from connections

    def ended(self, sample: Sample) -> None:
        self.running -= 1
        self.samples.append(sample)

    def lost(self, connection: _Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    # --- on the loop

    def _run(self) -> None:
        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(self._ask_all())

    async def _ask_all(self) -> None:
        started = time.monotonic()
        while self._may_ask() or self.running:
            now = time.monotonic()
            due = int((now - started) * self._per_s) - self._asked if self._per_s else self._clients - self.running
            for _ in range(due):
                if not self._may_ask():
                    break
                self._ask(now)
            await asyncio.sleep(TICK_S)
        for connection in tuple(self.idle):
            connection.close()
        await asyncio.sleep(0)

    def _may_ask(self) -> bool:
        return not self._is_stopping and (self._total is None or self._asked < self._total)

    def _ask(self, now: float) -> None:
        number = self._asked
        self._asked += 1
        self.running += 1
        if self.idle:
            self.idle.pop().ask(number, now)
        else:
            task = asyncio.get_running_loop().create_task(self._connect_and_ask(number, now))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect_and_ask(self, number: int, now: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: _Connection(self), *self._address)
        except OSError:
            self.ended(Sample(now, time.monotonic(), LOST, 0, number))
        else:
            connection.ask(number, now)
