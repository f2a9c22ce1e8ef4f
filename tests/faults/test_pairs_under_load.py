"""Prefill/decode pairs under transfer errors: what a thousand clients see of it, and what stays behind."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from pointsman.scripts.simulated_engine.text import generate_output
from tests.fakes.gateway import Gateway, gateway, session
from tests.fakes.pair_engines import PairFleet, pair_fleet

STREAMS = 1000
TOKENS = 12
TRANSFER_ERRORS = {"kind": "transfer_error", "rate": 0.05}


@pytest.fixture(scope="module")
def fleet() -> Iterator[PairFleet]:
    with pair_fleet(3, 3, "--preset", "a100-8b", "--max-sequences", "1024", "--speed", "4") as running:
        yield running


async def stream(client: aiohttp.ClientSession, url: str, prompt: str) -> str:
    """The text of one streamed completion, or what went wrong."""
    body = {"model": "sim-model", "prompt": prompt, "max_tokens": TOKENS, "stream": True}
    try:
        async with client.post(f"{url}/v1/completions", json=body) as answer:
            raw = (await answer.read()).decode()
            if answer.status != 200 or not raw.endswith("data: [DONE]\n\n"):
                return f"status {answer.status}: {raw[-200:]}"
    except aiohttp.ClientError as error:
        return repr(error)
    events = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events if "choices" in event)


def assert_nothing_stays(gate: Gateway) -> None:
    gate.wait_until("no load", lambda: not any(w["in_flight"] or w["holds"] for w in gate.workers()))
    assert gate.in_flight() == 0


@pytest.mark.slow
@pytest.mark.alone
def test_a_thousand_streams_with_five_percent_transfer_errors(fleet: PairFleet) -> None:
    """Clients do not notice, no room is used twice, and nobody's breaker opens for what was nobody's fault."""

    async def run(gate: Gateway) -> tuple[list[bool], list[str], list[dict[str, Any]]]:
        for number, decode in enumerate(fleet.decodes):
            await fleet.arm(decode, {**TRANSFER_ERRORS, "seed": number})
        prompts = [f"prompt {number} " * 20 for number in range(STREAMS)]
        async with session() as client:
            texts = await asyncio.gather(*(stream(client, gate.url, prompt) for prompt in prompts))
        right = ["".join(generate_output(prompt.encode(), TOKENS)) for prompt in prompts]
        good = [text == expected for text, expected in zip(texts, right, strict=True)]
        return good, list(texts), await fleet.states()

    with gateway(*fleet.flags) as gate:
        gate.wait_healthy(6)
        good, texts, states = asyncio.run(run(gate))
        failed = [text for text, is_good in zip(texts, good, strict=True) if not is_good]
        transfers = [state["transfers"] for state in states]
        print(f"\n{STREAMS} streams, {len(failed)} failed: {Counter(failed).most_common(3)}\n{transfers}")
        assert len(failed) < STREAMS / 1000, Counter(failed).most_common(5)
        assert sum(each["transfers_failed"] for each in transfers) > STREAMS * 0.03, "the errors struck"
        assert sum(each["rooms_reused"] for each in transfers) == 0
        assert sum(each["rooms_seen"] for each in transfers[3:]) >= STREAMS
        assert {worker["breaker"]["state"] for worker in gate.workers()} == {"closed"}
        assert_nothing_stays(gate)
        assert all(state["requests_running"] == 0 for state in asyncio.run(fleet.states()))
