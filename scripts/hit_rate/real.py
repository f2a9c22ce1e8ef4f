"""Real llama.cpp servers with small prompt caches, and what they find in them behind one policy or another."""

from __future__ import annotations

import asyncio
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

from pointsman.scripts import real_engines, real_model
from pointsman.scripts.hit_rate.client import Client, Tally
from pointsman.scripts.hit_rate.daemon import serve
from pointsman.scripts.hit_rate.workload import Recording

MODEL_KV_BYTES = 23_040
"""of one token in this model's KV cache: 30 layers, keys and values of 3 heads of 64 numbers of 2 bytes"""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RealSetup:
    """A server holds one prompt in its slot, and as many more as fit into `cache_mib` (least recently used go)."""

    recording: Recording
    at_once: int
    cache_mib: int
    context_tokens: int
    workers: int = 4

    def prompts_held(self, prompt_tokens: int) -> int:
        """By one server."""
        return 1 + self.cache_mib * 2**20 // (prompt_tokens * MODEL_KV_BYTES)


# Each group is one prompt to a server (the last one replaces the one before it): half of the groups fit into a server,
# all of them twice into the four.
GROUPS = RealSetup(Recording(groups=8, conversations=5, turns=1, system_chars=1024, turn_chars=120), 4, 21, 1024)


@contextmanager
def launch(setup: RealSetup) -> Iterator[list[str]]:
    """URLs of healthy servers. Raises EngineMissingError, ModelUnavailableError, or TimeoutError."""
    real_engines.require()
    model = real_model.ensure()
    with ExitStack() as stack:
        urls = [stack.enter_context(_server(setup, model)) for _ in range(setup.workers)]
        deadline = time.monotonic() + START_TIMEOUT_S
        for url in urls:
            _wait_healthy(url, deadline)
        yield urls


@contextmanager
def _server(setup: RealSetup, model: Path) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", "pointsman.scripts.hit_rate.bounded_llama", "--cache-mib", str(setup.cache_mib)]
    command += ["--model", str(model), "--port", str(port), "--slots", "1", "--context", str(setup.context_tokens)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_healthy(url: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise TimeoutError(f"{url} did not get healthy in {START_TIMEOUT_S:.0f} s")


def run(setup: RealSetup, policy: str, shards: int = 2) -> Tally:
    """On fresh servers, so that nothing is left of another run."""
    with launch(setup) as urls, serve(urls, shards, "--policy", policy) as address:
        client = Client([address], real_model.MODEL_NAME)
        return asyncio.run(client.drive(setup.recording.play(), setup.at_once))
