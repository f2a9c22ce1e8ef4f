"""`kill -9` of anything at random moments of a batch of 2,000 lines: it goes on by itself, and ends with one line each.

What was finished before a death, as the ledger has it, is never run again, unless the store has lost its result and the
batch says so.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from openai import APIConnectionError, APIStatusError, OpenAI
from openai.types import Batch

from pointsman.scripts.simulated_engine.launch import EngineAddress, launch_engines
from tests.daemon.stores.servers import Cluster, kill, mooncake_cluster, needs_mooncake
from tests.fakes.batches import FINAL, MODEL, chat_line, client_of, content, submit
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.processes import is_alive, wait_gone, wait_until

LINES = 2000
TIMEOUT_S = 240.0
DEATH_S = 10.0
PACE = ("--model", MODEL, "--preset", "h100-8b", "--max-sequences", "32")
"""a line takes about a fifth of a second"""
SLOWLY = ("--batch-concurrency", "12")
"""about 60 lines a second: a machine that looks only now and then is not overtaken by the batch"""
LESS_SLOWLY = ("--batch-concurrency", "24")


class Run:
    """A batch over the lives of several gateways in one folder."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.arguments = arguments
        self.gate: Gateway | None = None
        self.batch_id = ""
        self.finished: dict[str, float] = {}
        """request ids whose lines were done when something was killed, and the moment"""
        self.results_lost = 0
        self.logs: list[list[dict[str, Any]]] = []

    @contextmanager
    def life(self, workers: Sequence[str]) -> Iterator[Gateway]:
        with gateway(*self.arguments, workers=workers, folder=self.folder) as gate:
            gate.wait_log("batches_ready")
            self.gate = gate
            self.logs.append(gate.log)
            yield gate

    @property
    def client(self) -> OpenAI:
        assert self.gate is not None
        return client_of(self.gate)

    def look(self) -> Batch | None:
        """None while nobody answers."""
        try:
            return self.client.batches.retrieve(self.batch_id)
        except (APIConnectionError, APIStatusError):
            return None

    def until(self, what: str, holds: Callable[[Batch], bool]) -> Batch:
        deadline = time.monotonic() + TIMEOUT_S
        waiting = threading.Event()
        batch: Batch | None = None
        while batch is None or not holds(batch):
            assert time.monotonic() < deadline, f"{what}: {batch}"
            waiting.wait(0.05)
            batch = self.look()
        return batch

    def lines_done(self) -> int:
        counts = self.until("it answers", lambda batch: True).request_counts
        return 0 if counts is None else counts.completed + counts.failed

    def until_done(self, lines: int) -> bool:
        """Whether it is still running when so many are."""

        def is_there(batch: Batch) -> bool:
            counts = batch.request_counts
            return batch.status in FINAL or (counts is not None and counts.completed + counts.failed >= lines)

        return self.until(f"{lines} lines", is_there).status not in FINAL

    def note_finished(self) -> None:
        """From a copy of the ledger, whose owner is dead or stopped: it lets nobody else in."""
        now = time.time()
        copy = self.folder / "copy.db"
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{self.folder}/state/batches/ledger.db{suffix}", f"{copy}{suffix}")
        with closing(sqlite3.connect(copy)) as db:
            query = "SELECT number FROM lines JOIN batches ON serial = batch WHERE id = ? AND state > 0"
            done = [number for (number,) in db.execute(query, (self.batch_id,))]
        stem = self.batch_id.removeprefix("batch_")
        for number in done:
            self.finished.setdefault(f"batch_req_{stem}_{number}", now)

    def check_end(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(output, errors): every custom_id once, and nothing asked again whose result was kept."""
        batch = self.until("the end", lambda batch: batch.status in FINAL)
        assert batch.status == "completed", batch
        self.results_lost = (batch.model_extra or {})["pointsman"]["results_lost"]
        output, errors = content(self.client, batch.output_file_id), content(self.client, batch.error_file_id)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.completed, counts.failed) == (len(output), len(errors))
        ids = [line["custom_id"] for line in output + errors]
        assert sorted(ids) == sorted(f"line-{n}" for n in range(LINES))
        for line in output:
            assert line["response"]["body"]["choices"][0]["message"]["content"]
        for line in errors:
            assert line["error"]["code"]
        requests = [event for log in self.logs for event in log if event["event"] == "request"]
        again = [
            event["id"]
            for event in requests
            if event["id"] in self.finished and event["ts"] - event["total_ms"] / 1000 > self.finished[event["id"]]
        ]
        assert len(set(again)) <= self.results_lost, "what was finished was run again"
        return output, errors


def submit_to(run: Run) -> None:
    heads = [f"{name} " * 200 for name in ("alpha", "beta", "gamma", "delta")]
    lines = [chat_line(f"line-{n}", f"{heads[n % 4]} {n}", max_tokens=8) for n in range(LINES)]
    run.batch_id = submit(run.client, lines).id


def kill_all(gate: Gateway) -> None:
    """The whole gateway at once."""
    pids = [gate.process.pid, *gate.children()]
    for pid in pids:
        with suppress(ProcessLookupError):  # children die with their parent
            os.kill(pid, signal.SIGKILL)
    gate.process.wait()
    wait_gone(pids, DEATH_S)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_batch_survives_every_death(tmp_path: Path) -> None:
    draw = random.Random(20261121)
    run = Run(tmp_path, "--batch-store", "sqlite", *SLOWLY)
    deaths = ["gateway", "control", "worker", "gateway", "batches", "shard", "worker", "batches", "gateway"]
    happened: list[tuple[str, int]] = []
    with ExitStack() as stack:
        engines = [Engine(stack) for _ in range(2)]
        output: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        while True:
            with run.life([engine.url for engine in engines]) as gate:
                if not run.batch_id:
                    submit_to(run)
                is_gone = False
                for victim in deaths[len(happened) :]:
                    moment = run.lines_done() + draw.randrange(60, 160)
                    if not run.until_done(moment):
                        break
                    is_gone = strike(run, gate, victim, engines[0])
                    happened.append((victim, moment))
                    if is_gone:
                        break
                else:
                    output, errors = run.check_end()
            if not is_gone:
                break
            engines[0].come_back()
    assert len(happened) == len(deaths), f"the batch was over after {happened}"
    assert (len(output), len(errors), run.results_lost) == (LINES, 0, 0)
    assert len(run.finished) > LINES // 4, "much was finished before the last death"


class Engine:
    """A simulated engine that can be killed, and comes back on its port."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.address: EngineAddress = self._start(0)
        self.url = self.address.url

    def _start(self, port: int) -> EngineAddress:
        (address,) = self._stack.enter_context(launch_engines(1, "--port", str(port), *PACE))
        return address

    def die(self) -> None:
        os.kill(self.address.pid, signal.SIGKILL)
        wait_until("the engine is dead", lambda: not is_alive(self.address.pid), DEATH_S)

    def come_back(self) -> None:
        """If it was dead."""
        if not is_alive(self.address.pid):
            self.address = self._start(self.address.port)


def strike(run: Run, gate: Gateway, victim: str, engine: Engine) -> bool:
    """Whether the gateway is gone. The engine stays dead until the gateway dies, too."""
    if victim == "gateway":
        kill_all(gate)
        run.note_finished()
        return True
    if victim == "batches":
        (pid,) = gate.pids("batches")
        gate.signal(signal.SIGSTOP)  # the supervisor: no successor opens the ledger before we have read it
        os.kill(pid, signal.SIGKILL)
        wait_until("the runner is dead", lambda: not is_alive(pid), DEATH_S)
        run.note_finished()
        gate.signal(signal.SIGCONT)
        return False
    note_while_it_runs(run, gate)
    if victim == "worker":
        engine.die()
    else:
        os.kill(gate.pids(victim)[0], signal.SIGKILL)
    return False


def note_while_it_runs(run: Run, gate: Gateway) -> None:
    (pid,) = gate.pids("batches")
    os.kill(pid, signal.SIGSTOP)
    try:
        run.note_finished()
    finally:
        os.kill(pid, signal.SIGCONT)


def strike_the_store(gate: Gateway, victim: str, cluster: Cluster, holder: subprocess.Popen[bytes]) -> None:
    if victim == "holder":
        kill(holder)
    elif victim == "client":
        os.kill(client_of_the_store(gate), signal.SIGKILL)
    else:
        kill(cluster.master)
        cluster.start_master()


def client_of_the_store(gate: Gateway) -> int:
    """The runner's child process with the Mooncake client."""
    (runner,) = gate.pids("batches")
    found = [
        int(pid) for task in Path(f"/proc/{runner}/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    (child,) = found
    return child


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["holder", "client", "gateway", "master"])
@pytest.mark.parametrize("mooncake", [pytest.param("", marks=needs_mooncake)])
def test_a_batch_on_mooncake_survives_too(tmp_path: Path, victim: str, mooncake: str) -> None:
    """A second holder has all that the dead one had. A master that dies takes all results along: they are reported as
    lost and their lines run again, from the input that is kept on disk."""
    moment = random.Random(f"{victim}-20261121").randrange(LINES // 3, LINES * 3 // 4)
    folder = tmp_path / "servers"
    folder.mkdir()
    with ExitStack() as stack:
        cluster: Cluster = stack.enter_context(mooncake_cluster(folder))
        holders = [cluster.start_holder(256) for _ in range(2)]
        engines = [Engine(stack) for _ in range(2)]
        urls = [engine.url for engine in engines]
        store = f"mooncake://{cluster.address}?replicas=2&min_replicas=1"
        run = Run(tmp_path, "--batch-store", store, *LESS_SLOWLY)
        with run.life(urls) as gate:
            submit_to(run)
            assert run.until_done(moment), "it was over too soon"
            if victim == "gateway":
                strike(run, gate, victim, engines[0])
            else:
                note_while_it_runs(run, gate)
                strike_the_store(gate, victim, cluster, holders[0])
            ended = None if victim == "gateway" else run.check_end()
        if ended is None:
            with run.life(urls):
                ended = run.check_end()
    output, errors = ended
    assert (len(output), len(errors)) == (LINES, 0)
    assert len(run.finished) >= LINES // 3
    if victim == "master":
        assert run.results_lost >= len(run.finished)
    else:
        assert run.results_lost == 0
