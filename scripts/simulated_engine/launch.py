"""Starts simulated engines as a process of their own and ends it with the caller."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_STOP_TIMEOUT_S = 10.0


@dataclass(slots=True, frozen=True)
class EngineAddress:
    url: str
    port: int
    pid: int
    bootstrap_port: int = 0


@contextmanager
def launch_engines(count: int = 1, *arguments: str) -> Iterator[list[EngineAddress]]:
    """`arguments` are those of the command line. The engines end with the block, or with this process."""
    command = [sys.executable, "-m", "pointsman.scripts.simulated_engine"]
    command += ["--engines", str(count), "--exit-on-stdin-eof", *arguments]
    # The command is our own interpreter with the caller's arguments, no shell.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _read_addresses(process)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _read_addresses(process: subprocess.Popen[str]) -> list[EngineAddress]:
    if process.stdout is None:
        raise RuntimeError("the process has no pipe for its output")
    addresses: list[EngineAddress] = []
    for line in process.stdout:
        if line.strip() == "ready":
            return addresses
        addresses.append(EngineAddress(**json.loads(line)))
    raise RuntimeError(f"simulated engines ended with exit code {process.wait()}")
