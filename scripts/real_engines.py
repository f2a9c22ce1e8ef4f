"""Starts llama.cpp servers with the real model as processes of their own and ends them with the caller."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pointsman.daemon.errors import PointsmanError
from pointsman.scripts import real_model

START_TIMEOUT_S = 120.0


class EngineMissingError(PointsmanError):
    """The package with the engine is not installed."""


def require() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise EngineMissingError("the real engine is missing; install it with: pip install 'pointsman[real]'")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class RealEngine:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def launch_real_engines(count: int, *arguments: str) -> Iterator[list[RealEngine]]:
    """`count` healthy servers. Raises EngineMissingError, ModelUnavailableError, or TimeoutError."""
    require()
    model = real_model.ensure()
    with ExitStack() as stack:
        engines = [stack.enter_context(_worker(model, *arguments)) for _ in range(count)]
        for engine in engines:
            _wait_healthy(engine.url)
        yield engines


@contextmanager
def _worker(model: Path, *arguments: str) -> Iterator[RealEngine]:
    port = _free_port()
    command = [sys.executable, "-m", "pointsman.scripts.llama_worker", "--model", str(model), "--port", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([*command, *arguments], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet) as process:
        try:
            yield RealEngine(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_healthy(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not get healthy in {START_TIMEOUT_S:.0f} s")
