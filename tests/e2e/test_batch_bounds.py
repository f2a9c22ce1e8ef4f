"""Batches at their bounds: size, disk, upgrades, live traffic."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from openai import InternalServerError

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.batches import MODEL, chat_line, client_of, content, submit, until_final
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.processes import resident_bytes

CHAT: Final = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--model", MODEL) as running:
        yield [engine.url for engine in running]


class MemoryWatch:
    """The most that a process has held since the watch began."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._is_over = threading.Event()
        self.before = self.most = resident_bytes(pids)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self.most = max(self.most, resident_bytes(self._pids))

    def grown_mib(self) -> float:
        self._is_over.set()
        self._thread.join()
        return (self.most - self.before) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_thousand_lines_and_200_mb_are_never_in_memory(engines: list[str], tmp_path: Path) -> None:
    """Uploaded, validated and begun; running all of them would only take long."""
    lines, size = 50_000, 199 << 20
    source = tmp_path / "in.jsonl"
    filling = "word " * ((size // lines - 250) // 5)
    with source.open("wb") as file:
        for n in range(lines):
            file.write(json.dumps(chat_line(f"line-{n}", f"{n % 50} {filling}", max_tokens=1)).encode() + b"\n")
    assert 190 << 20 < source.stat().st_size < 200 << 20
    with gateway("--batch-store", "sqlite", workers=engines) as gate:
        gate.wait_log("batches_ready")
        runner, shards = MemoryWatch(gate.pids("batches")), MemoryWatch(gate.pids("shard"))
        client = client_of(gate)
        with source.open("rb") as file:
            uploaded = client.files.create(file=("in.jsonl", file), purpose="batch")
        batch = client.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h")
        gate.wait_until("2,000 lines", lambda: done(gate, batch.id) >= 2000, 300)
        assert client.batches.cancel(batch.id).status == "cancelling"
        final = until_final(client, batch.id, 120)
        grown = runner.grown_mib(), shards.grown_mib()
        assert final.request_counts is not None
        counts = final.request_counts
        assert (counts.total, counts.completed + counts.failed) == (lines, lines)
        assert sum(1 for _ in content(client, final.error_file_id)) == counts.failed
    assert grown[0] < 160, f"runner: {grown[0]:.0f} MiB"
    assert grown[1] < 40, f"shards: {grown[1]:.0f} MiB"


def done(gate: Gateway, batch_id: str) -> int:
    counts = client_of(gate).batches.retrieve(batch_id).request_counts
    return 0 if counts is None else counts.completed + counts.failed


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_disk_that_is_full_pauses_and_room_resumes(engines: list[str], tmp_path: Path) -> None:
    """The bound of the store stands for the disk's; room comes from deleting another file."""
    store = f"sqlite:{tmp_path}/payloads.db?max_bytes=400000"
    with gateway("--batch-store", store, workers=engines) as gate:
        gate.wait_log("batches_ready")
        client = client_of(gate)
        ballast = client.files.create(file=("ballast", b"x" * 350_000), purpose="batch")
        batch = submit(client, [chat_line(f"line-{n}", max_tokens=60) for n in range(150)])

        def paused() -> str | None:
            extra = client.batches.retrieve(batch.id).model_extra or {}
            reason: str | None = extra["pointsman"]["paused"]
            return reason

        gate.wait_until("it is paused", lambda: paused() == "no_space", 60)
        gate.wait_until("metrics say so", lambda: gate.metrics()["pointsman_batches_paused"] == 1)
        stored = done(gate, batch.id)
        assert 0 < stored < 150
        client.files.delete(ballast.id)
        final = until_final(client, batch.id, 60)
        assert final.status == "completed"
        assert len(content(client, final.output_file_id)) == 150
        assert (final.model_extra or {})["pointsman"] == {"paused": None, "results_lost": 0}
        asked = [event["id"] for event in gate.log if event["event"] == "request" and event["path"] == CHAT]
        assert len(asked) == len(set(asked)) == 150, "what was answered while there was no room is not asked again"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_upgrade_takes_the_batches_along() -> None:
    """The new daemon's runner goes on when the old one's has ended; nothing that was finished is run again."""
    lines = 1200
    with (
        launch_engines(2, "--model", MODEL, "--preset", "h100-8b") as paced,
        gateway(
            "--batch-store", "sqlite", "--batch-concurrency", "16", workers=[engine.url for engine in paced]
        ) as gate,
    ):
        gate.wait_log("batches_ready")
        client = client_of(gate, max_retries=5)
        batch = submit(client, [chat_line(f"line-{n}", max_tokens=40) for n in range(lines)])
        gate.wait_until("some lines", lambda: done(gate, batch.id) > 50, 60)
        upgraded = gate.upgrade()
        assert upgraded.returncode == 0, upgraded.stderr
        assert done_when_back(gate, batch.id) < lines, "it has work left"
        final = until_final(client_of(gate, max_retries=5), batch.id, 90)
        assert final.status == "completed"
        assert len(content(client, final.output_file_id)) == lines
        asked = Counter(event["id"] for event in gate.log if event["event"] == "request" and event["path"] == CHAT)
        answered_twice = [name for name, times in asked.items() if times > 1]
        assert len(asked) == lines
        assert len(answered_twice) <= 16, "only what was under way and did not end in time"


def done_when_back(gate: Gateway, batch_id: str) -> int:
    """As soon as a runner answers again: for a moment there is none."""

    def ask() -> int | None:
        try:
            return done(gate, batch_id)
        except InternalServerError:
            return None

    found = gate.wait_until("the runner of the new daemon answers", lambda: (ask() or -1) + 1, 30)
    return found - 1
