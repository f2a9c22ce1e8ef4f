"""Decode engines with memory for a few requests, and many at once: the usual cause of a KVTransferError under load."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from pointsman.scripts.simulated_engine.text import generate_output
from tests.fakes.gateway import Gateway, gateway, session
from tests.fakes.pair_engines import PairFleet, pair_fleet

REQUESTS, TOKENS = 96, 40
KV_TOKENS = 256
"""for about four requests at once, each of which takes about 0.7 s: eight seconds for all, on two engines"""
TIMEOUT_S = 2.0


@pytest.fixture
def fleet() -> Iterator[PairFleet]:
    flags = (
        "--preset",
        "a100-8b",
        "--speed",
        "0.5",
        "--kv-tokens",
        str(KV_TOKENS),
        "--bootstrap-timeout",
        str(TIMEOUT_S),
    )
    with pair_fleet(1, 2, *flags) as running:
        yield running


def workers_file(fleet: PairFleet, folder: Path, kv_tokens: int) -> str:
    """Declares what memory the decode workers have."""
    prefill = fleet.prefills[0]
    workers = [{"url": prefill.url, "worker_type": "prefill", "bootstrap_port": prefill.bootstrap_port}]
    workers += [{"url": one.url, "worker_type": "decode", "kv_tokens": kv_tokens} for one in fleet.decodes]
    path = folder / "workers.json"
    path.write_text(json.dumps({"workers": workers}))
    return str(path)


async def ask_all(gate: Gateway) -> Counter[object]:
    """How many answers were right; the others by status."""

    async def one(client: aiohttp.ClientSession, number: int) -> object:
        prompt = f"request {number:3} " * 6
        body = {"model": "sim-model", "prompt": prompt, "max_tokens": TOKENS}
        async with client.post(f"{gate.url}/v1/completions", json=body) as answer:
            document = await answer.json()
            is_right = answer.status == 200 and document["choices"][0]["text"] == "".join(
                generate_output(prompt.encode(), TOKENS)
            )
            return "right" if is_right else answer.status

    async with session() as client:
        return Counter(await asyncio.gather(*(one(client, number) for number in range(REQUESTS))))


def run(fleet: PairFleet, folder: Path, kv_tokens: int) -> tuple[Counter[object], int, dict[str, float]]:
    """(answers, transfers that found no memory in time, metrics)"""
    flags = ("--workers-file", workers_file(fleet, folder, kv_tokens), "--pd-headroom-wait-s", "60")
    with gateway(*flags) as gate:
        gate.wait_healthy(3)
        answers = asyncio.run(ask_all(gate))
        gate.wait_until("no load", lambda: not any(w["in_flight"] or w["holds"] for w in gate.workers()))
        starved = sum(state["transfers"]["transfers_starved"] for state in asyncio.run(fleet.states()))
        print(f"\n{kv_tokens} tokens declared: {dict(answers)}, {starved} transfers without memory")
        return answers, starved, gate.metrics()


def failed_legs(metrics: dict[str, float]) -> float:
    return sum(count for name, count in metrics.items() if name.startswith("pointsman_pair_errors_total"))


@pytest.mark.slow
def test_a_prefill_begins_when_decode_has_memory_for_it(fleet: PairFleet, tmp_path: Path) -> None:
    answers, starved, metrics = run(fleet, tmp_path, KV_TOKENS)
    assert answers == {"right": REQUESTS}
    assert starved == 0
    assert metrics['pointsman_pair_events_total{event="memory_wait"}'] > 0
    assert failed_legs(metrics) == 0


@pytest.mark.slow
def test_without_knowing_of_the_memory_transfers_would_fail(fleet: PairFleet, tmp_path: Path) -> None:
    """What the other test is compared with: the engines do fail transfers under this load."""
    _, starved, metrics = run(fleet, tmp_path, 1_000_000)
    assert starved > 0
    assert failed_legs(metrics) > 0
    assert metrics['pointsman_pair_events_total{event="memory_wait"}'] == 0
