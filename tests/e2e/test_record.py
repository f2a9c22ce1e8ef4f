"""`pointsman record` on a running daemon: the file replays with the hit rate that the engines had, and has no text."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pointsman.daemon.cli import replay
from pointsman.scripts.replay.traces import read_trace
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway, session

GROUPS = 24
TURNS = 16
CLIENTS = 6
PRESET = "h100-8b"
KV_TOKENS = 12_000
"""of each engine; all groups do not fit into one"""
BOUND = 0.05
"""from the engines' hit rate to the replay's: live clients wait for answers, recorded times do not (0.03 measured)"""
SECRET = "kumquat"


@pytest.fixture(scope="module")
def gate() -> Iterator[Gateway]:
    with (
        launch_engines(4, "--kv-tokens", str(KV_TOKENS), "--block-tokens", "128", "--preset", PRESET) as engines,
        gateway(workers=[engine.url for engine in engines], shards=2) as running,
    ):
        yield running


class Recorder:
    def __init__(self, gate: Gateway, target: Path, *flags: str) -> None:
        self.gate = gate
        command = [sys.executable, "-m", "pointsman.daemon.main", "record", "--admin", f"unix:{gate.socket_path}"]
        self.process = subprocess.Popen(
            [*command, "-o", str(target), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

    def end(self, code: int = 0) -> tuple[str, str]:
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == code, err
        return out, err

    def interrupt(self) -> tuple[str, str]:
        self.process.send_signal(signal.SIGINT)
        return self.end()


@contextmanager
def recorder(gate: Gateway, target: Path, *flags: str) -> Iterator[Recorder]:
    """One that has begun."""
    known = began(gate)
    running = Recorder(gate, target, *flags)
    try:
        gate.wait_until("a recording begins", lambda: began(gate) > known)
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def began(gate: Gateway) -> int:
    return logged(gate, "recording_began")


def logged(gate: Gateway, event: str) -> int:
    return sum(line["event"] == event for line in gate.log)


def prompts(seed: int) -> list[str]:
    """Groups that share 2 KiB and go on each for itself, in random order."""
    draw = random.Random(seed)
    heads = [f"{SECRET} {seed}.{group} " + draw.randbytes(1024).hex() for group in range(GROUPS)]
    found = [head[:2048] + draw.randbytes(300).hex() for head in heads for _ in range(TURNS)]
    draw.shuffle(found)
    return found


async def send(gate: Gateway, wanted: list[str]) -> list[dict[str, int]]:
    """What the engines told of all of them, in the order of sending."""
    waiting = iter(enumerate(wanted))
    told: dict[int, dict[str, int]] = {}

    async def ask(client: aiohttp.ClientSession) -> None:
        for number, prompt in waiting:
            told[number] = await usage_of(client, gate.url, prompt, is_streamed=number % 2 == 0)

    async with session() as client, asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(ask(client))
    return [told[number] for number in sorted(told)]


async def usage_of(client: aiohttp.ClientSession, url: str, prompt: str, *, is_streamed: bool) -> dict[str, int]:
    body: dict[str, Any] = {"model": "sim-model", "prompt": prompt, "max_tokens": 5}
    if is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with client.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        text = await answer.text()
    if is_streamed:
        text = text.split("data: ")[-2]
    usage = json.loads(text)["usage"]
    details = usage["prompt_tokens_details"] or {}
    return {"prompt": usage["prompt_tokens"], "cached": details.get("cached_tokens") or 0}


def hit_rate(told: list[dict[str, int]]) -> float:
    """Of what replay looks at too: without warm-up and tail."""
    kept = told[int(len(told) * 0.08) : len(told) - int(len(told) * 0.05)]
    return sum(one["cached"] for one in kept) / sum(one["prompt"] for one in kept)


def replayed_hit_rate(trace: Path, folder: Path, policy: str) -> float:
    result = folder / f"{policy}.json"
    fleet = ["--workers", "4", "--kv-tokens", str(KV_TOKENS), "--preset", PRESET, "--as-recorded"]
    assert replay.run([str(trace), *fleet, "--policy", policy, "--json", str(result)]) == 0
    (run,) = json.loads(result.read_bytes())["runs"]
    return float(run["measures"]["hit_rate"])


def test_a_recording_replays_with_the_engines_hit_rate_and_has_no_text(gate: Gateway, tmp_path: Path) -> None:
    target = tmp_path / "traffic.jsonl.gz"
    wanted = prompts(1)
    with recorder(gate, target) as running:
        told = asyncio.run(send(gate, wanted))
        out, err = running.interrupt()
    assert f"{len(wanted)} requests" in out
    assert "WARNING" not in err
    trace = read_trace(target)
    assert len(trace.requests) == len(wanted)
    assert trace.block_tokens == 128
    assert sum(one.input_length for one in trace.requests) == sum(one["prompt"] for one in told)
    assert {one.output_length for one in trace.requests} == {5}
    times = [one.timestamp for one in trace.requests]
    assert times == sorted(times)
    text = gzip.decompress(target.read_bytes()).decode()
    assert SECRET not in text
    assert not any(prompt[at : at + 8] in text for prompt in wanted for at in (20, 200, 2100))
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [target]

    live = hit_rate(told)
    found = replayed_hit_rate(target, tmp_path, "expected_cost")
    blind = replayed_hit_rate(target, tmp_path, "random")
    print(f"\nhit rate: live {live:.3f}, replayed {found:.3f}, replayed by random {blind:.3f}")
    assert abs(live - found) < BOUND
    assert blind < found - 2 * BOUND, "the recording tells policies apart"


def test_time_ends_it_and_requests_that_run_are_waited_for(gate: Gateway, tmp_path: Path) -> None:
    target = tmp_path / "short.jsonl"
    with recorder(gate, target, "--minutes", "0.02", "--json") as running:
        asyncio.run(send(gate, prompts(2)[:20]))
        out, err = running.end()
    assert "recording for" in err
    summary = json.loads(out)
    assert summary["is_complete"]
    assert 0 < summary["recorded"] == len(read_trace(target).requests)
    assert summary["lost"] == summary["unfinished"] == 0


def test_only_one_at_a_time(gate: Gateway, tmp_path: Path) -> None:
    with recorder(gate, tmp_path / "first.jsonl") as first:
        _, err = Recorder(gate, tmp_path / "second.jsonl").end(1)
        assert "somebody records already" in err
        asyncio.run(send(gate, prompts(3)[:2]))
        first.interrupt()
    assert [path.name for path in tmp_path.iterdir()] == ["first.jsonl"]


def test_a_recorder_that_is_killed_leaves_a_trace_and_the_daemon_off(gate: Gateway, tmp_path: Path) -> None:
    target = tmp_path / "killed.jsonl"
    with recorder(gate, target) as running:
        asyncio.run(send(gate, prompts(4)[:20]))
        part = target.with_name("killed.jsonl.part")
        gate.wait_until("lines are written as they come", lambda: part.read_bytes().count(b"\n") == 1 + 20)
        running.process.kill()
        running.process.wait()
    gate.wait_until("the daemon notices", lambda: logged(gate, "recording_ended") == began(gate))
    assert len(read_trace(part).requests) == 20
    with recorder(gate, tmp_path / "next.jsonl") as following:
        asyncio.run(send(gate, prompts(5)[:3]))
        following.interrupt()
    assert len(read_trace(tmp_path / "next.jsonl").requests) == 3


def test_a_daemon_that_stops_ends_it(tmp_path: Path) -> None:
    target = tmp_path / "drained.jsonl"
    with launch_engines(1) as engines, gateway(workers=[engines[0].url], shards=1) as own:
        with recorder(own, target) as running:
            asyncio.run(send(own, prompts(6)[:5]))
            own.signal(signal.SIGTERM)
            running.end()
        own.process.wait(60)
    assert len(read_trace(target).requests) == 5


def test_no_traffic_no_file(gate: Gateway, tmp_path: Path) -> None:
    with recorder(gate, tmp_path / "empty.jsonl", "--minutes", "0.001") as running:
        _, err = running.end(1)
    assert "nothing is written" in err
    assert list(tmp_path.iterdir()) == []
