"""`pointsman serve` as a process of its own, in a folder of its own, on a free port; ends with the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0


@contextmanager
def serve(workers: Sequence[str], shards: int, *arguments: str) -> Iterator[tuple[str, int]]:
    """Host and port of a daemon whose `workers` are all healthy. Raises RuntimeError when it does not get there."""
    with tempfile.TemporaryDirectory(prefix="pointsman-hit-rate-") as folder:
        command = [sys.executable, "-m", "pointsman.daemon.main", "serve", "--port", "0", "--shards", str(shards)]
        command += ["--admin-listen", f"unix:{folder}/admin.sock", *arguments, "--workers", *workers]
        log = Path(folder) / "log"
        with log.open("wb") as output, subprocess.Popen(command, env=_environment(folder), stderr=output) as process:
            try:
                yield _wait_ready(process, log, len(workers))
            finally:
                _stop(process)


def _environment(folder: str) -> dict[str, str]:
    places = {}
    for name in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY"):
        place = Path(folder) / name.partition("_")[0].lower()
        place.mkdir(mode=0o700)
        places[name] = str(place)
    return os.environ | {"POINTSMAN_PREFIX_INDEX_MIB": "32"} | places


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _wait_ready(process: subprocess.Popen[bytes], log: Path, workers: int) -> tuple[str, int]:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with log.open("rb") as lines:
        while time.monotonic() < deadline and process.poll() is None:
            address = _address(lines)
            if address is not None:
                _wait_healthy(*address, workers, deadline)
                return address
            time.sleep(0.02)
    raise RuntimeError(f"the daemon did not get ready:\n{log.read_text()[-2000:]}")


def _address(lines: IO[bytes]) -> tuple[str, int] | None:
    for line in lines:
        event = json.loads(line) if line.startswith(b"{") and line.endswith(b"\n") else {}
        if event.get("event") == "ready":
            host, _, port = event["listen"].rpartition(":")
            return host.strip("[]"), int(port)
    return None


def _wait_healthy(host: str, port: int, workers: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/readiness", timeout=5) as answer:
                if json.load(answer)["healthy_workers"] == workers:
                    return
        except urllib.error.HTTPError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"not all of the {workers} workers are healthy")
