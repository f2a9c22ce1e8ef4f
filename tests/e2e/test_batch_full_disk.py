"""A disk that is really full: ledger, payloads and their logs in a small file system of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIStatusError

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.batches import MODEL, chat_line, client_of, content, done, paused, submit, until_final
from tests.fakes.gateway import Gateway, gateway

LINES = 1500
MOST_OPEN = 2 * 64
"""lines that are asked or wait to be stored: twice batch_concurrency"""
DISK_MIB = 24


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("nobody here may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.optional_heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_full_disk_pauses_the_batch_and_loses_nothing(disk: Path, is_killed: bool) -> None:
    """Also when the runner is killed meanwhile: its successor has to begin on a full disk."""
    with (
        launch_engines(2, "--model", MODEL, "--preset", "h100-8b", "--speed", "2") as engines,
        gateway("--batch-store", "sqlite", workers=[engine.url for engine in engines], folder=disk) as gate,
    ):
        gate.wait_log("batches_ready")
        batch = submit(client_of(gate), [chat_line(f"line-{n}", max_tokens=20) for n in range(LINES)])
        gate.wait_until("some lines", lambda: done(gate, batch.id) >= LINES // 5, 60)
        ballast = disk / "ballast"
        fill(ballast)
        gate.wait_until("it is paused", lambda: paused(gate, batch.id), 60)
        stored = done(gate, batch.id)
        assert stored < LINES
        if is_killed:
            (runner,) = gate.pids("batches")
            os.kill(runner, signal.SIGKILL)
            gate.wait_until(
                "its successor has tried", lambda: told(gate, "batches_failed") or gate.pids("batches") != [runner], 30
            )
        ballast.unlink()
        gate.wait_until("the runner answers", lambda: is_there(gate, batch.id), 60)
        final = until_final(client_of(gate), batch.id, 90)
        assert final.status == "completed"
        output = content(client_of(gate), final.output_file_id)
        assert [line["custom_id"] for line in output] == [f"line-{n}" for n in range(LINES)]
        asked = [event["id"] for event in gate.log if event["event"] == "request" and "chat" in event["path"]]
        assert len(set(asked)) == LINES
        assert len(asked) <= LINES + (MOST_OPEN if is_killed else 0), (
            "only what waited for room in memory is asked again"
        )


def told(gate: Gateway, event: str) -> bool:
    return any(line["event"] == event for line in gate.log)


def is_there(gate: Gateway, batch_id: str) -> bool:
    try:
        return bool(client_of(gate).batches.retrieve(batch_id))
    except APIStatusError:
        return False


def fill(path: Path) -> None:
    """Until not a byte fits any more."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    os.write(descriptor, bytes(size))
            except OSError:
                continue
    finally:
        os.close(descriptor)
