"""A stream whose worker fails in the middle of it goes on from another one, and its client need not notice.

`streamFailure: continue`, two shards, three simulated engines behind proxies that fail on command. The engines'
text depends on all text before it, as with greedy decoding: whatever is lost, repeated or asked wrongly shows in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.answers import DONE, Answer, read_answer
from tests.fakes.chaos import ChaosFleet, Cut, Delay, Drip, Fault, How, Status, chaos
from tests.fakes.gateway import Gateway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.traffic import Client, client_of_each, request

TOKENS = 12
PROFILE = {
    "streamFailure": "continue",
    "retry": {"max_retries": 3, "initial_backoff_ms": 5, "budget_ratio": 1, "budget_min_per_s": 1000},
    "timeouts": {"connect_s": 1, "first_token_s": 2, "idle_s": 0.4, "total_s": 10},
}
SHARED = {"breaker": {"enabled": False}}
FLAGS = ("--policy", "round_robin", "--health-down-interval-s", "0.1")
CONTINUED = b": continued on another worker"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ids = count()


@pytest.fixture(scope="module", params=["vllm", "sglang", "llamacpp"])
def fleet(request: pytest.FixtureRequest) -> Iterator[ChaosFleet]:
    with launch_engines(3, "--flavor", request.param) as engines, chaos([e.url for e in engines]) as running:
        yield running


@pytest.fixture(scope="module")
def gate(fleet: ChaosFleet) -> Iterator[Gateway]:
    with gateway_with(PROFILE, SHARED, *FLAGS, workers=fleet.urls) as (running, _):
        yield running


@pytest.fixture(scope="module")
def clients(gate: Gateway) -> Iterator[list[Client]]:
    """One on each shard."""
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as found:
        yield list(found.values())


@pytest.fixture(autouse=True)
def healed(fleet: ChaosFleet) -> Iterator[None]:
    yield
    fleet.heal()


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": "count to twelve"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "count to twelve"}]}
    usage = {"include_usage": True}
    return {"model": "sim-model", "max_tokens": TOKENS, "stream": True, "stream_options": usage, **prompt, **fields}


def ask(client: Client, fleet: ChaosFleet, path: str, faults: Sequence[Fault | None], **fields: Any) -> Answer:
    request_id = f"broken-{next(_ids)}"
    fleet.plan(request_id, *faults)
    client.sock.sendall(request(body_for(path, **fields), path, {"X-Request-Id": request_id}))
    return read_answer(client)


def text_of(answer: Answer) -> str:
    choices = [choice for event in told(answer) for choice in event.get("choices", ())]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


def told(answer: Answer) -> list[dict[str, Any]]:
    import json

    return [json.loads(e.removeprefix(b"data: ")) for e in answer.events if e.startswith(b"data: ") and e != DONE]


FAULTS = (Cut(How.RESET, after_events=4), Cut(How.FIN, 30, after_events=4), Cut(How.HANG, 30, after_events=3))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fault", FAULTS, ids=["reset", "end inside an event", "standstill"])
def test_try(clients: list[Client], fleet: ChaosFleet, path: str, fault: Cut) -> None:
    for client in clients:
        whole = ask(client, fleet, path, [])
        broken = ask(client, fleet, path, [fault])
        print(whole.body.decode())
        print(broken.body.decode())
        assert text_of(broken) == text_of(whole)
        assert broken.is_whole
