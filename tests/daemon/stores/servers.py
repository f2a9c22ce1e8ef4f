"""Real servers for the stores, each a child of the test on free loopback ports, ended by its own process handle."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.fakes.processes import wait_until

START_TIMEOUT_S = 60.0
HOLDER = Path(__file__).with_name("mooncake_holder.py")

HAS_MOONCAKE = importlib.util.find_spec("mooncake") is not None
HAS_MOONCAKE_WHEEL = platform.machine() in ("x86_64", "aarch64") and sys.version_info < (3, 14)
"""for this platform and Python; the condition in pyproject.toml"""
needs_redis = [pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")]
needs_mooncake = [pytest.mark.skipif(not HAS_MOONCAKE, reason="the mooncake wheel is not installed")]
if not HAS_MOONCAKE_WHEEL:
    needs_mooncake.append(pytest.mark.optional_heavy)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=dict(os.environ, **environment)
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    def listens() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    wait_until(f"port {port} listens", listens, START_TIMEOUT_S)


@contextmanager
def redis_server(folder: Path, *arguments: str) -> Iterator[str]:
    """Its URL."""
    (port,) = free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    log = folder / "redis.log"
    with running([*command, *arguments], log) as process:
        wait_listening(process, port, log)
        yield f"redis://127.0.0.1:{port}"


class Cluster:
    """A Mooncake master and its holders."""

    def __init__(self, folder: Path, stack: ExitStack, client_ttl_s: int) -> None:
        self._folder = folder
        self._client_ttl_s = client_ttl_s
        self._stack = stack
        self.port, self._metrics_port = free_ports(2)
        self.master = self.start_master()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_master(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mooncake.cli", f"--client_ttl={self._client_ttl_s}"]
        command += ["--logtostderr", "--rpc_address=127.0.0.1", f"--rpc_port={self.port}"]
        command += ["--metrics_host=127.0.0.1", f"--metrics_port={self._metrics_port}"]
        log = self._folder / "master.log"
        self.master = self._stack.enter_context(running(command, log))
        wait_listening(self.master, self.port, log)
        return self.master

    def start_holder(self, size_mib: int = 64) -> subprocess.Popen[bytes]:
        log = self._folder / f"holder-{time.monotonic_ns()}.log"
        command = [sys.executable, str(HOLDER), self.address, str(size_mib)]
        holder = self._stack.enter_context(running(command, log, MC_TCP_BIND_ADDRESS="127.0.0.1"))

        def is_mounted() -> bool:
            said = log.read_text(errors="replace")
            assert holder.poll() is None, said[-2000:]
            return "HOLDER READY" in said

        wait_until("the holder has joined", is_mounted, START_TIMEOUT_S)
        return holder


@contextmanager
def mooncake_cluster(folder: Path, client_ttl_s: int = 3) -> Iterator[Cluster]:
    """`client_ttl_s`: after so long the master gives up a holder that is silent, and its copies."""
    with ExitStack() as stack:
        yield Cluster(folder, stack, client_ttl_s)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
