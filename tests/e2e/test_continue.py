"""A stream whose worker fails in the middle of it goes on from another one, and its client need not notice.

`streamFailure: continue`, two shards, three simulated engines behind proxies that fail on command. The engines'
text depends on all text before it, as with greedy decoding: whatever is lost, repeated or asked wrongly shows in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.answers import DONE, Answer, read_answer
from tests.fakes.chaos import ChaosFleet, Cut, Fault, How, Status, Trouble, chaos
from tests.fakes.gateway import Gateway
from tests.fakes.live_profiles import gateway_with
from tests.fakes.processes import wait_until
from tests.fakes.traffic import Client, client_of_each, request

TOKENS = 12
ATTEMPTS = 3
PROFILE = {
    "streamFailure": "continue",
    "retry": {"max_retries": ATTEMPTS, "initial_backoff_ms": 5, "budget_ratio": 1, "budget_min_per_s": 1000},
    "timeouts": {"connect_s": 1, "first_token_s": 1, "idle_s": 0.4, "total_s": 8},
}
SHARED = {"breaker": {"enabled": False}}
FLAGS = ("--policy", "round_robin", "--health-down-interval-s", "0.1")
CONTINUED = b": continued on another worker"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BROKEN = Cut(How.FIN, after_events=4)
FAULTS = {
    "end": BROKEN,
    "end inside an event": Cut(How.FIN, 30, after_events=3),
    "standstill inside an event": Cut(How.HANG, 30, after_events=5),
}
_ids = count()


@pytest.fixture(scope="module", params=["vllm", "sglang", "llamacpp"])
def fleet(request: pytest.FixtureRequest) -> Iterator[ChaosFleet]:
    with launch_engines(3, "--flavor", request.param) as engines, chaos([engine.url for engine in engines]) as running:
        yield running


@pytest.fixture(scope="module")
def gate(fleet: ChaosFleet) -> Iterator[Gateway]:
    with gateway_with(PROFILE, SHARED, *FLAGS, workers=fleet.urls) as (running, _):
        yield running


@pytest.fixture(scope="module")
def clients(gate: Gateway) -> Iterator[list[Client]]:
    """One on each shard, kept open over all tests: no answer may break its connection but a broken one."""
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as found:
        yield list(found.values())


@pytest.fixture(autouse=True)
def nothing_stays(gate: Gateway, fleet: ChaosFleet) -> Iterator[None]:
    yield
    fleet.heal()
    gate.wait_until("no load", lambda: [worker["in_flight"] for worker in gate.workers()] == [0, 0, 0], 2)
    assert gate.in_flight() == 0
    assert gate.metrics()["pointsman_buffered_bytes"] == 0


# --- questions and answers


def question(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": "count to twelve"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "count to twelve"}]}
    usage = {"include_usage": True}
    return {"model": "sim-model", "max_tokens": TOKENS, "stream": True, "stream_options": usage, **prompt, **fields}


def send(client: Client, fleet: ChaosFleet, path: str, faults: Sequence[Fault | None], **fields: Any) -> str:
    request_id = f"broken-{next(_ids)}"
    fleet.plan(request_id, *faults)
    client.sock.sendall(request(question(path, **fields), path, {"X-Request-Id": request_id}))
    return request_id


def ask(client: Client, fleet: ChaosFleet, path: str, faults: Sequence[Fault | None], **fields: Any) -> Answer:
    send(client, fleet, path, faults, **fields)
    return read_answer(client)


def documents(answer: Answer) -> list[dict[str, Any]]:
    events = [event.removeprefix(b"data: ") for event in answer.events if event.startswith(b"data: {")]
    return [json.loads(event) for event in events]


def text_of(answer: Answer) -> str:
    choices = [choice for document in documents(answer) for choice in document.get("choices", ())]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


def assert_is_one_stream(answer: Answer, whole: Answer, breaks: int = 1) -> None:
    """The same stream as an unbroken one but for its comments."""
    assert answer.is_whole
    assert answer.status == 200
    assert answer.events.count(CONTINUED) == breaks
    assert (answer.events[-1], answer.events.count(DONE)) == (DONE, 1)
    found, expected = documents(answer), documents(whole)
    assert text_of(answer) == text_of(whole)
    assert len({document["id"] for document in found}) == 1
    assert len({document["created"] for document in found}) == 1
    assert [document["choices"] for document in found] == [document["choices"] for document in expected]
    tokens = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [found[-1]["usage"][name] for name in tokens] == [expected[-1]["usage"][name] for name in tokens]


def assert_ends_with_error(answer: Answer, code: str) -> None:
    assert not answer.is_whole
    assert DONE not in answer.events
    assert json.loads(answer.events[-1].removeprefix(b"data: "))["error"]["code"] == code
    assert answer.body.endswith(b"\n\n")


# --- what is continued


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_client_gets_one_stream(
    gate: Gateway, clients: list[Client], fleet: ChaosFleet, path: str, fault: Cut
) -> None:
    continued = gate.metrics()["pointsman_continued_streams_total"]
    for client in clients:
        whole = ask(client, fleet, path, [])
        assert len(documents(whole)) >= TOKENS
        request_id = send(client, fleet, path, [fault])
        answer = read_answer(client)
        assert_is_one_stream(answer, whole)
        attempts = fleet.attempts_of(request_id)
        assert len({attempt.worker for attempt in attempts}) == len(attempts) == 2
        line = gate.wait_log("request", id=request_id)
        assert (line["continuations"], line["attempts"], line["end"]) == (1, 2, "complete")
        assert line["output_tokens"] == TOKENS
        assert client.get("/health").status == 200, "the connection is kept"
    assert gate.metrics()["pointsman_continued_streams_total"] == continued + len(clients)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_it_may_break_again(clients: list[Client], fleet: ChaosFleet, path: str) -> None:
    for client in clients:
        whole = ask(client, fleet, path, [])
        answer = ask(client, fleet, path, [BROKEN, Cut(How.FIN, 10, after_events=3)])
        assert_is_one_stream(answer, whole, breaks=2)


def test_an_attempt_that_fails_before_it_goes_on(clients: list[Client], fleet: ChaosFleet) -> None:
    """It is retried like any other, and leaves no trace in the stream."""
    for client in clients:
        whole = ask(client, fleet, CHAT, [])
        for failing in (Status(503), Cut(How.RESET), Cut(How.RESET, after_bytes=40)):
            assert_is_one_stream(ask(client, fleet, CHAT, [BROKEN, failing]), whole)


@pytest.mark.parametrize("place", [{"after_events": 4}, {"after_events": 3, "after_bytes": 30}])
def test_resets(clients: list[Client], fleet: ChaosFleet, place: dict[str, int]) -> None:
    """What the kernel throws away with the connection was not told; if that is all, the request is simply retried."""
    for client in clients:
        whole = ask(client, fleet, CHAT, [])
        answer = ask(client, fleet, CHAT, [Cut(How.RESET, **place)])
        assert_is_one_stream(answer, whole, breaks=answer.events.count(CONTINUED))
        assert CONTINUED in answer.events or answer.headers["x-pointsman-attempts"] == "2"


def test_nothing_but_the_role_was_told(clients: list[Client], fleet: ChaosFleet) -> None:
    for client in clients:
        whole = ask(client, fleet, CHAT, [])
        answer = ask(client, fleet, CHAT, [Cut(How.FIN, after_events=1)])
        assert text_of(answer) == text_of(whole)
        assert_is_one_stream(answer, whole)


# --- what is not


def fresh(gate: Gateway) -> Client:
    return Client((gate.host, gate.port))


def test_attempts_are_bounded(gate: Gateway, fleet: ChaosFleet) -> None:
    with fresh(gate) as client:
        whole = ask(client, fleet, CHAT, [])
        request_id = send(client, fleet, CHAT, [Cut(How.FIN, after_events=3)] * 5)
        answer = read_answer(client)
        assert_ends_with_error(answer, "worker_bad_answer")
        assert answer.events.count(CONTINUED) == ATTEMPTS - 1
        text = text_of(answer)
        assert len(text) >= 4 * (ATTEMPTS + 1)
        assert text_of(whole).startswith(text)
        assert len(fleet.attempts_of(request_id)) == ATTEMPTS
        line = gate.wait_log("request", id=request_id)
        assert (line["continuations"], line["end"]) == (ATTEMPTS - 1, "worker_broke")


def test_a_worker_that_refuses_the_rest(gate: Gateway, fleet: ChaosFleet) -> None:
    with fresh(gate) as client:
        answer = ask(client, fleet, CHAT, [BROKEN, Status(400)])
        assert_ends_with_error(answer, "worker_bad_answer")
        assert CONTINUED not in answer.events


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (CHAT, {"n": 2}),
        (CHAT, {"logprobs": True}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (COMPLETIONS, {"prompt": ["a", "b"]}),
        (COMPLETIONS, {"max_tokens": None}),
    ],
)
def test_requests_that_cannot_be_continued_end_as_without_the_option(
    gate: Gateway, fleet: ChaosFleet, path: str, fields: dict[str, Any]
) -> None:
    with fresh(gate) as client:
        request_id = send(client, fleet, path, [BROKEN], **fields)
        assert_ends_with_error(read_answer(client), "worker_bad_answer")
        assert len(fleet.attempts_of(request_id)) == 1


def test_no_token_is_left(gate: Gateway, fleet: ChaosFleet) -> None:
    """All were told when it broke, but not why it ended."""
    with fresh(gate) as client:
        is_finish_apart = len(documents(ask(client, fleet, CHAT, [], max_tokens=3))) > 5
        if not is_finish_apart:
            return  # an engine that tells the end with the last token has no such moment
        answer = ask(client, fleet, CHAT, [Cut(How.FIN, after_events=4)], max_tokens=3)
        assert_ends_with_error(answer, "worker_bad_answer")


def test_a_client_that_leaves_while_it_is_continued(gate: Gateway, fleet: ChaosFleet) -> None:
    with fresh(gate) as client:
        request_id = send(client, fleet, CHAT, [BROKEN, Cut(How.HANG)])
        wait_until("the second worker has it", lambda: len(fleet.attempts_of(request_id)) == 2, 5)
    assert gate.wait_log("request", id=request_id)["end"] == "client_left"


def test_many_at_once(gate: Gateway, fleet: ChaosFleet) -> None:
    """Workers break three of ten streams, of whichever attempt: each client gets its own text, or an honest error."""
    troubles = [Trouble(Cut(How.FIN, 20, after_events=3), rate=0.3, seed=seed) for seed in range(len(fleet.workers))]
    for trouble, worker in zip(troubles, fleet.workers, strict=True):
        worker.suffers(trouble)

    def ask_some(number: int) -> list[tuple[Answer, Answer]]:
        prompt = [{"role": "user", "content": f"client {number}"}]
        found = []
        for _ in range(8):
            with fresh(gate) as client:
                whole = ask(client, fleet, CHAT, [None], messages=prompt)
                found.append((whole, ask(client, fleet, CHAT, [], messages=prompt)))
        return found

    with ThreadPoolExecutor(8) as pool:
        pairs = [pair for some in pool.map(ask_some, range(8)) for pair in some]
    continued = 0
    for whole, answer in pairs:
        breaks = answer.events.count(CONTINUED)
        continued += breaks
        if answer.is_whole:
            assert_is_one_stream(answer, whole, breaks)
        else:
            assert_ends_with_error(answer, "worker_bad_answer")
            assert text_of(whole).startswith(text_of(answer))
    given_up = sum(not answer.is_whole for _, answer in pairs)
    assert continued + given_up == sum(trouble.struck for trouble in troubles), "every break is accounted for"
    assert continued > 0
    assert given_up <= len(pairs) // 6
