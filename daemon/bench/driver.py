"""Connections to one target: sends requests, reads their answers, says what became of each.

A connection is kept while the target keeps it, but not used again after MAX_IDLE_S without a request: many servers
close at five seconds, and a request that meets the closing is nobody's error.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from time import monotonic_ns
from typing import Any, cast

from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.connection import Connection, Job
from pointsman.daemon.bench.outcome import CONNECT, DISCONNECT, GENERATOR, TIMEOUT, Verdict
from pointsman.daemon.bench.sockets import Sockets
from pointsman.daemon.bench.target import Target

MAX_IDLE_S = 2.0
SWEEP_S = 0.05
_OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOMEM, errno.ENOBUFS)
"""Errors of making a connection that say nothing of the target."""


class Driver:
    def __init__(self, target: Target, timeout_s: float) -> None:
        """On a running loop. `timeout_s`: of a request from the moment that it is sent, connecting included."""
        self.target = target
        self.connects = 0
        """connections made so far"""
        self.in_flight = 0
        self._events_ended = 0
        self._timeout_ns = int(timeout_s * 1e9)
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._busy: set[Connection] = set()
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._sockets = Sockets(self._loop)
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        _raise_file_limit()

    def send(self, job: Job) -> None:
        """`job.ended` is called once, never from within this call."""
        job.sent_ns = monotonic_ns()
        self.in_flight += 1
        while self._idle:
            connection = self._idle.pop()
            if connection.is_closed:
                continue
            if job.sent_ns - connection.idle_since_ns > MAX_IDLE_S * 1e9:
                connection.close()
                continue
            self._busy.add(connection)
            connection.send(job)
            return
        task = self._loop.create_task(self._open(job))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    @property
    def events(self) -> int:
        """Of streams, read so far."""
        return self._events_ended + sum(connection.events for connection in self._busy)

    async def close(self) -> None:
        """What runs is given up, and nobody hears of it."""
        self._sweeper.cancel()
        for task in tuple(self._opening):
            task.cancel()
        for connection in (*self._busy, *self._idle):
            connection.job = None
            connection.close()
        await asyncio.gather(*self._opening, return_exceptions=True)
        self._sockets.close()
        await asyncio.sleep(0)  # transports that were aborted close in the loop's next turn

    # --- from connections

    def rest(self, connection: Connection) -> None:
        self.forget(connection)
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self.in_flight -= 1
        self._events_ended += connection.events
        self._busy.discard(connection)

    # --- inside

    async def _open(self, job: Job) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect()
        except TimeoutError:
            self._never_sent(job, Verdict(TIMEOUT, "no connection in time"))
        except OSError as error:
            kind = GENERATOR if error.errno in _OURS else CONNECT
            self._never_sent(job, Verdict(kind, error.strerror or str(error)))
        else:
            self.connects += 1
            if connection.is_closed:  # as soon as it was made
                self._never_sent(job, Verdict(DISCONNECT, "closed as soon as it was connected"))
                return
            self._busy.add(connection)
            connection.send(job)

    async def _connect(self) -> Connection:
        target = self.target
        connection = Connection(self)
        if target.tls is None:
            self._sockets.adopt(await _connect_plain(self._loop, target.host, target.port), connection)
        else:
            protocol = cast(Any, connection)
            await self._loop.create_connection(lambda: protocol, target.host, target.port, ssl=target.tls)
        return connection

    def _never_sent(self, job: Job, verdict: Verdict) -> None:
        self.in_flight -= 1
        answer = Answer()
        answer.expect(job.is_stream, job.gaps)
        job.ended(job, verdict, answer, monotonic_ns())

    def _sweep(self) -> None:
        """One timer for all: one for each request would cost more than the rest of it."""
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        now_ns = monotonic_ns()
        limit_ns = now_ns - self._timeout_ns
        late = [one for one in self._busy if one.job is not None and one.job.sent_ns < limit_ns]
        for connection in late:
            connection.time_out(now_ns)


async def _connect_plain(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """To the first of the host's addresses that accepts. Raises the OSError of the last one."""
    failure = OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        made = socket.socket(family, kind, protocol)
        try:
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(made, address)
        except OSError as error:
            made.close()
            failure = OSError(error.errno, os.strerror(error.errno or 0))
        except BaseException:
            made.close()
            raise
        else:
            return made
    raise failure


def _raise_file_limit() -> None:
    """As many connections as this user may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
