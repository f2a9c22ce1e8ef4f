"""Clients that never stop: kept-alive connections in a thread of their own, each with one request at a time.

Cheap on purpose (an asyncio protocol, no HTTP library): the machine's two processors belong to the daemon. Whatever is
not a complete answer with status 200 is a failure, with the local port of its connection, so that a test can say on
which shard it happened.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import uvloop

from tests.fakes.leeway import leeway

PATH = "/v1/completions"
ANSWER_TIMEOUT_S = 30.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_GENERATION = re.compile(rb"\r\nx-pointsman-generation: *(\d+)", re.IGNORECASE)
_WORKER = re.compile(rb"\r\nx-pointsman-worker: *(\S+)", re.IGNORECASE)
LAST_CHUNK = b"\r\n0\r\n\r\n"


def request(body: Mapping[str, Any], path: str = PATH, headers: Mapping[str, str] | None = None) -> bytes:
    """One POST in wire form."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def completion(prompt: str = "count to three", max_tokens: int = 1, **fields: Any) -> bytes:
    return request({"model": "sim-model", "prompt": prompt, "max_tokens": max_tokens, **fields})


@dataclass(frozen=True, slots=True)
class Failure:
    what: str
    port: int
    """of the client's end of the connection"""
    at: float
    status: int = 0
    """0: no head of an answer was read"""


@dataclass(slots=True)
class Report:
    """Written by the traffic's thread alone; plain reads from others are what CPython guarantees."""

    answered: int = 0
    longest_s: float = 0.0
    """from a request (or the connection for it) to its answer"""
    by_worker: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    backwards: list[tuple[int, int, int]] = field(default_factory=list)
    """(local port, generation, the later and smaller one)"""
    generations: set[int] = field(default_factory=set)
    last_generation: dict[int, int] = field(default_factory=dict)
    """by local port"""


class _Connection(asyncio.Protocol):
    """Sends the next request when the last one was answered in full."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._buffer = b""
        self._needed = -1
        """length of the answer, head included; -1 unknown, -2 chunked"""
        self._head = b""
        self.is_asking = False
        self.asked_at = 0.0
        self.port = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.port = transport.get_extra_info("sockname")[1]
        self._traffic.open[self.port] = self
        self._next()

    def _next(self) -> None:
        if not self._traffic.may_ask():
            self._transport.close()
            return
        self.is_asking = True
        self.asked_at = time.monotonic()
        self._buffer, self._head, self._needed = b"", b"", -1
        self._transport.write(self._traffic.wire)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._needed == -1:
            head, blank, _ = self._buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            self._head = head
            length = _LENGTH.search(head)
            self._needed = len(head) + 4 + int(length[1]) if length else -2
            if not length and not _CHUNKED.search(head):
                self._fail("an answer without framing")
                return
        size = len(self._buffer)
        if size >= self._needed >= 0 or (self._needed == -2 and self._buffer.endswith(LAST_CHUNK)):
            self._answered()

    def _answered(self) -> None:
        self.is_asking = False
        report, head = self._traffic.report, self._head
        generation = _GENERATION.search(head)
        if generation:
            self._note_generation(int(generation[1]))
        if self.status != 200:
            self._fail(f"status {self.status}: {self._buffer[len(head) :][:300]!r}")
            return
        if not self._traffic.is_complete(self._buffer):
            self._fail(f"an answer without its end: {self._buffer[-200:]!r}")
            return
        report.answered += 1
        report.longest_s = max(report.longest_s, time.monotonic() - self.asked_at)
        worker = _WORKER.search(head)
        if worker:
            report.by_worker[worker[1].decode()] += 1
        if _CLOSES.search(head):
            self._transport.close()
        else:
            self._next()

    @property
    def status(self) -> int:
        return int(self._head[9:12]) if self._head else 0

    def _note_generation(self, generation: int) -> None:
        report = self._traffic.report
        last = report.last_generation.get(self.port, 0)
        if generation < last:
            report.backwards.append((self.port, last, generation))
        report.last_generation[self.port] = generation
        report.generations.add(generation)

    def _fail(self, what: str) -> None:
        self.is_asking = False
        self._traffic.report.failures.append(Failure(what, self.port, time.monotonic(), self.status))
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_asking:
            self._fail(f"connection lost: {exc!r} after {len(self._buffer)} bytes")
        self._traffic.open.pop(self.port, None)
        self.closed.set_result(None)


class Traffic:
    """`with Traffic(...) as traffic:` asks over `connections` connections until `stop`, or until `total` is reached."""

    def __init__(
        self,
        address: tuple[str, int],
        wire: bytes,
        *,
        connections: int,
        total: int | None = None,
        reconnects: bool = True,
        secure: ssl.SSLContext | None = None,
        is_complete: Callable[[bytes], bool] = lambda _answer: True,
    ) -> None:
        self.wire = wire
        self.report = Report()
        self.open: dict[int, _Connection] = {}
        self.is_complete = is_complete
        self._address = address
        self._connections = connections
        self._reconnects = reconnects
        self._secure: dict[str, Any] = {"ssl": secure, "server_hostname": "localhost"} if secure else {}
        self._left = total
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def may_ask(self) -> bool:
        if self._is_stopping or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def stop(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Report:
        """No new requests; those that run are waited for."""
        self._is_stopping = True
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Report:
        """Until all requests have been answered."""
        self._thread.join(timeout_s * leeway())
        assert not self._thread.is_alive(), f"the traffic did not end in {timeout_s} s: {self.report.answered} answered"
        return self.report

    def ports(self) -> set[int]:
        """Local ports of the connections that are open now."""
        return set(self.open.copy())

    def _run(self) -> None:
        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(self._ask_all())

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask() for _ in range(self._connections)))

    async def _ask(self) -> None:
        """One client: a connection, and (if it `reconnects`) another one when it is lost."""
        loop = asyncio.get_running_loop()
        while not self._is_stopping and self._left != 0:
            try:
                _, connection = await loop.create_connection(lambda: _Connection(self), *self._address, **self._secure)
            except OSError as error:
                self.report.failures.append(Failure(f"connect: {error!r}", 0, time.monotonic()))
                await asyncio.sleep(0.01)
                continue
            await connection.closed
            if not self._reconnects:
                return


def shards_of_connections(pids: list[int], port: int) -> dict[int, int]:
    """Which process serves which client, by the client's port: as the kernel knows it.

    A connection that still waits in a listener's queue has no process yet, and no entry here.
    """
    owners: dict[str, int] = {}
    for pid in pids:
        with suppress(FileNotFoundError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    owners[str(entry.readlink())] = pid
    found: dict[int, int] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *rest = line.split()
        owner = owners.get(f"socket:[{rest[5]}]")
        if owner is not None and state == "01" and int(local.partition(":")[2], 16) == port:
            found[int(remote.partition(":")[2], 16)] = owner
    return found


def read_fields(head: bytes) -> dict[str, str]:
    """The header fields of an answer, names in lower case; `:status` is its status."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return {":status": first.split()[1]} | {name.lower(): value.strip() for name, _, value in fields}


class Client:
    """One connection, one request after the other, by hand: for a test that wants to know where it is connected."""

    def __init__(self, address: tuple[str, int], timeout_s: float = 10.0, secure: ssl.SSLContext | None = None) -> None:
        self.sock = socket.create_connection(address, timeout=timeout_s * leeway())
        if secure is not None:
            self.sock = secure.wrap_socket(self.sock, server_hostname="localhost")
        self.port: int = self.sock.getsockname()[1]
        self.rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, wire: bytes) -> Reply:
        self.sock.sendall(wire)
        return self.read()

    def get(self, path: str) -> Reply:
        return self.ask(f"GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())

    def read_head(self) -> dict[str, str]:
        """The next answer's header fields, names in lower case; `:status` is its status."""
        while b"\r\n\r\n" not in self.rest:
            self._receive()
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        return read_fields(head)

    def read(self) -> Reply:
        headers = self.read_head()
        if "content-length" in headers:
            size = int(headers["content-length"])
            while len(self.rest) < size:
                self._receive()
            body, self.rest = self.rest[:size], self.rest[size:]
            return Reply(int(headers[":status"]), headers, body)
        while not self.rest.endswith(LAST_CHUNK):
            self._receive()
        body, self.rest = self.rest, b""
        return Reply(int(headers[":status"]), headers, body)

    def read_more(self) -> bytes:
        """Whatever comes next; empty at the end. Raises OSError when the connection is reset."""
        if self.rest:
            data, self.rest = self.rest, b""
            return data
        return self.sock.recv(65536)

    def read_to_end(self) -> bytes:
        """All that comes until the connection ends."""
        data = b""
        while more := self.read_more():
            data += more
        return data

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError(f"the connection ended after {self.rest[-200:]!r}")
        self.rest += data


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def generation(self) -> int:
        return int(self.headers["x-pointsman-generation"])

    @property
    def profile(self) -> str:
        return self.headers.get("x-pointsman-profile", "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def client_of_each(
    pids: list[int], address: tuple[str, int], tries: int = 200, secure: ssl.SSLContext | None = None
) -> Iterator[dict[int, Client]]:
    """One connection to each of these shards, by process id."""
    found: dict[int, Client] = {}
    with ExitStack() as stack:
        for _ in range(tries):
            client = stack.enter_context(Client(address, secure=secure))
            client.get("/health")
            pid = shards_of_connections(pids, address[1]).get(client.port)
            if pid is None or pid in found:
                client.sock.close()
            else:
                found[pid] = client
            if len(found) == len(pids):
                yield found
                return
        raise AssertionError(f"no connection reached one of {pids}, only {list(found)}")
