"""The real control process, its supervisor played by the test: sockets, segment, leash, and the word on generations."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from pointsman.config import settings as settings_codec
from pointsman.config import snapshot as snapshot_codec
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon import leash
from pointsman.daemon.leash import Message
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment

TIMEOUT_S = 40.0
POLL_S = 0.005

Json = Any


async def until(claim: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Waits for `claim` to become true; returns its value."""

    async def fetch() -> Any:
        return claim()

    return await _becomes(fetch, bool, timeout_s)


async def _becomes(fetch: Callable[[], Awaitable[Json]], claim: Callable[[Json], bool], timeout_s: float) -> Json:
    async with asyncio.timeout(timeout_s):
        while not claim(value := await fetch()):  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(POLL_S)
        return value


class Engine:
    """A worker: health and models as the test says, on a port that outlives a stop."""

    def __init__(self) -> None:
        self.health_status = 200
        self.models: list[str] | None = []
        self.is_silent = False
        self.port = 0
        self.requests: list[str] = []
        self._runner: web.ServerRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._answer), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        self.requests.append(request.path)
        if self.is_silent:
            await asyncio.Event().wait()
        if request.path == "/v1/models" and self.models is not None:
            return web.json_response({"object": "list", "data": [{"id": model} for model in self.models]})
        return web.Response(status=self.health_status if request.path == "/health" else 404)


class Supervisor:
    """Everything that outlives a control process: sockets, segment, the last snapshot."""

    def __init__(self, directory: Path, **fields: Any) -> None:
        self.directory = directory
        admin_path = directory / "admin.sock"
        options: dict[str, Any] = {
            "runtime_dir": str(directory),
            "state_dir": str(directory / "state"),
            "admin_listen": (f"unix:{admin_path}",),
            "port": 1,
            "max_workers": 8,
            "health_interval_s": 0.2,
            "health_down_interval_s": 0.1,
            "health_timeout_s": 1.0,
        }
        self.settings = Settings(**(options | fields))
        self.segment = Segment.create(2, self.settings.max_workers)
        self.state = RoutingState.create(self.segment, IndexSize(4, 512), 2**26)
        self.admin = socket.socket(socket.AF_UNIX)
        self.admin.bind(str(admin_path))
        self.admin.listen()
        self.http = aiohttp.ClientSession(
            "http://control", connector=aiohttp.UnixConnector(str(admin_path)), timeout=aiohttp.ClientTimeout(TIMEOUT_S)
        )
        self.log_path = directory / "control.log"
        self.published: list[Snapshot] = []
        self.refusal: str | None = None
        """What the shards say to the next generations."""
        self.is_ready = False
        self.stands_by = False
        """what the next process is told"""
        self.heard: list[str] = []
        """kinds of the messages of all processes"""
        self.process: subprocess.Popen[bytes] | None = None
        self._leash: socket.socket | None = None

    @property
    def current(self) -> Snapshot:
        return self.published[-1]

    @property
    def log(self) -> list[Json]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]

    # --- the process

    def spawn(self) -> subprocess.Popen[bytes]:
        ours, theirs = leash.pair()
        settings_fd = leash.sealed_memfd("settings", settings_codec.encode(self.settings))
        fds = (settings_fd, self.segment.fd, self.state.index.fd, theirs.fileno(), self.admin.fileno())
        names = ("--settings-fd", "--segment-fd", "--prefix-fd", "--leash-fd", "--admin-fds")
        command = [sys.executable, "-m", "pointsman.daemon.control"]
        command += [word for name, fd in zip(names, fds, strict=True) for word in (name, str(fd))]
        command += ["--data-ports", str(self.settings.port)]
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(command, pass_fds=fds, stderr=output)
        theirs.close()
        os.close(settings_fd)
        self._leash = ours
        self.is_ready = False
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read, ours)
        return self.process

    async def start(self) -> None:
        process = self.spawn()
        await until(lambda: self.is_ready or process.poll() is not None)
        assert self.is_ready, self.log_path.read_text()

    async def ended(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for the end of the process; returns its exit code."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, timeout_s)
        self.cut_leash()
        return process.returncode

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.ended()

    async def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    def cut_leash(self) -> None:
        if self._leash is not None:
            asyncio.get_running_loop().remove_reader(self._leash.fileno())
            self._leash.close()
            self._leash = None

    async def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            await self.kill()
        self.cut_leash()
        await self.http.close()
        self.admin.close()

    # --- the leash

    def say(self, kind: str, **fields: Any) -> None:
        assert self._leash is not None
        leash.send(self._leash, Message(kind, **fields))

    def _read(self, sock: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionError):
            while True:
                message, fd = leash.receive(sock)
                if message is None:
                    asyncio.get_running_loop().remove_reader(sock.fileno())
                    return
                self.heard.append(message.kind)
                if message.kind == "hello":
                    self._welcome(sock)
                elif message.kind == "publish" and fd is not None:
                    self._roll_out(sock, message, fd)
                elif message.kind == "ready":
                    self.is_ready = True

    def _welcome(self, sock: socket.socket) -> None:
        if not self.published:
            leash.send(sock, Message("welcome", stands_by=self.stands_by))
            return
        fd = leash.sealed_memfd("snapshot", snapshot_codec.encode(self.current))
        leash.send(sock, Message("welcome", self.current.generation, stands_by=self.stands_by), fd)
        os.close(fd)

    def _roll_out(self, sock: socket.socket, message: Message, fd: int) -> None:
        snapshot = snapshot_codec.decode(leash.read_all(fd))
        os.close(fd)
        assert snapshot.generation == message.generation > self.segment.generation
        if self.refusal is not None:
            leash.send(sock, Message("refused", message.generation, self.refusal))
            return
        self.published.append(snapshot)
        self.segment.make_current(snapshot.generation)
        leash.send(sock, Message("published", snapshot.generation))

    # --- the admin API

    async def call(self, method: str, path: str, body: Json = None) -> tuple[int, Json]:
        async with self.http.request(method, path, json=body) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> Json:
        status, body = await self.call("GET", path)
        assert status == 200, body
        return body

    async def add(self, url: str, **fields: Json) -> Json:
        """The worker as it is shown after it was added."""
        status, body = await self.call("POST", "/workers", {"url": url, **fields})
        assert status == 202, body
        return await self.get(f"/workers/{body['worker_id']}")

    async def workers(self, state: str = "") -> list[Json]:
        found = await self.get(f"/workers?state={state}" if state else "/workers")
        workers: list[Json] = found["workers"]
        return workers

    async def workers_become(self, claim: Callable[[list[Json]], bool], state: str = "") -> list[Json]:
        workers: list[Json] = await _becomes(lambda: self.workers(state), claim, TIMEOUT_S)
        return workers

    async def config_becomes(self, claim: Callable[[Json], bool]) -> Json:
        return await _becomes(lambda: self.get("/config"), claim, TIMEOUT_S)


def write(path: Path, content: Json) -> Path:
    """As careful programs do: aside, then renamed over."""
    aside = path.with_suffix(".new")
    aside.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    aside.replace(path)
    return path


@asynccontextmanager
async def supervisor(directory: Path, **fields: Any) -> AsyncIterator[Supervisor]:
    one = Supervisor(directory, **fields)
    try:
        yield one
    finally:
        await one.close()


@asynccontextmanager
async def engine(**fields: Any) -> AsyncIterator[Engine]:
    one = Engine()
    for name, value in fields.items():
        setattr(one, name, value)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


def reboot(old: Supervisor) -> dict[str, Any]:
    """Settings for a new daemon on the same directories."""
    return {name: getattr(old.settings, name) for name in ("state_dir", "workers_file", "profiles_file", "workers")}
