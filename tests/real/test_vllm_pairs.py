"""Real vLLM engines in pairs, KV over NIXL: texts are a single worker's, also when prefill workers are killed.

Greedy text of a model whose every token depends on the whole prompt, two shards. Run by scripts/test-pd-real alone.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from tests.fakes.gateway import Gateway, gateway
from tests.real.vllm_engines import MODEL, VllmEngine, vllm_engines

pytestmark = [pytest.mark.real_engines, pytest.mark.timeout(900)]

WORDS = ("def", "return", "class", "the", "value", "object", "is", "import", "for", "with", "while", "name", "module")
ANSWER_TIMEOUT_S = 300.0
STEP_TIMEOUT_S = 30.0
"""of what the gateway does by itself; multiplied by the machine's leeway"""


@dataclass(frozen=True)
class Question:
    """No two of them share a prefix: what decode has of the prompt can only have come from prefill."""

    path: str = "/v1/completions"
    stream: bool = False
    salt: str = field(default_factory=lambda: uuid4().hex)

    @property
    def body(self) -> dict[str, Any]:
        words = " ".join(random.Random(self.salt).choices(WORDS, k=300))
        prompt = {"messages": [{"role": "user", "content": words}]} if "chat" in self.path else {"prompt": words}
        asked = {"model": MODEL, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "cache_salt": self.salt}
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return {**asked, **prompt, **streamed}


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    headers: dict[str, str]
    seconds: float


def ask(url: str, question: Question, **changes: Any) -> Answer:
    body, began = {**question.body, **changes}, time.monotonic()
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}{question.path}", json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answered:
        raw, headers = answered.read(), dict(answered.headers)
    lines = [line.removeprefix(b"data: ") for line in raw.splitlines()] if question.stream else [raw]
    documents = [json.loads(line) for line in lines if line.startswith(b"{")]
    text = "".join(_text(choice) for document in documents for choice in document["choices"])
    return Answer(text, documents[-1]["usage"]["prompt_tokens"], headers, time.monotonic() - began)


def _text(choice: dict[str, Any]) -> str:
    said = choice.get("delta") or choice.get("message")
    return str(choice["text"] if said is None else said.get("content") or "")


def alone(engine: VllmEngine, question: Question) -> str:
    """What one worker says that computes the prompt itself."""
    return ask(engine.url, question, cache_salt=uuid4().hex).text


def serve(engines: Sequence[VllmEngine], *flags: str) -> AbstractContextManager[Gateway]:
    roles = [part for engine in engines for part in (f"--{engine.role}", engine.url)]
    return gateway(*roles, "--vllm-pd-disaggregation", *flags)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[VllmEngine]]:
    """Two prefill workers and a decode worker; the last two tests kill the former, one after the other."""
    with vllm_engines("prefill", "prefill", "decode") as running:
        yield running


@pytest.fixture
def left(engines: list[VllmEngine]) -> list[VllmEngine]:
    return [engine for engine in engines if engine.is_running]


@dataclass
class Asking:
    """A request under way."""

    gate: Gateway
    question: Question
    answer: Answer | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        self.answer = ask(self.gate.url, self.question)

    def wait(self) -> Answer:
        self._thread.join(ANSWER_TIMEOUT_S)
        assert self.answer is not None, self.gate.log_text()
        return self.answer


def killed_between_the_legs(
    gate: Gateway, engines: Sequence[VllmEngine], question: Question
) -> tuple[Answer, VllmEngine]:
    """(the client's answer, the prefill worker that was killed after its own and before decode had read its request)"""
    decode = next(engine for engine in engines if engine.role == "decode")
    with decode.frozen():
        asking = Asking(gate, question)
        url = gate.wait_until("prefill has answered", _holder(gate), STEP_TIMEOUT_S)
        victim = next(engine for engine in engines if engine.url == url)
        victim.kill()
    return asking.wait(), victim


def _holder(gate: Gateway) -> Callable[[], str | None]:
    """The URL of the worker whose KV decode has yet to fetch."""
    return lambda: next((str(worker["url"]) for worker in gate.workers() if worker["holds"]), None)


def counted(gate: Gateway, name: str, **labels: str) -> float:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return gate.metrics()[f"pointsman_pair_{name}{{{inside}}}"]


# --- in the order in which they stand: the last ones kill


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_pair_says_what_a_single_worker_does(left: list[VllmEngine], path: str, stream: bool) -> None:
    """And decode computes nothing of the prompt: all of it is counted as KV from outside."""
    decode = left[-1]
    with serve(left) as gate:
        gate.wait_healthy(len(left))
        for _ in range(4):
            question = Question(path, stream)
            before = decode.prompt_tokens("external_kv_transfer"), decode.prompt_tokens("local_compute")
            answer = ask(gate.url, question)
            external = decode.prompt_tokens("external_kv_transfer") - before[0]
            assert (external, decode.prompt_tokens("local_compute")) == (answer.prompt_tokens, before[1])
            assert answer.prompt_tokens >= 300
            assert answer.text == alone(left[0], question) == alone(decode, question)
            print(f"\n{path} {answer.prompt_tokens} tokens, {external:.0f} external, {answer.seconds:.2f} s", end="")
        assert counted(gate, "requests_total", leg="prefill") == counted(gate, "requests_total", leg="decode") == 4


def test_parameters_older_than_the_lease_are_not_used(left: list[VllmEngine]) -> None:
    """A pause keeps decode waiting for longer than that; then prefill runs again."""
    prefill, decode = left[0], left[-1]
    with serve([prefill, decode], "--kv-lease-s", "1") as gate:
        gate.wait_healthy(2)
        question, before = Question(), decode.prompt_tokens("external_kv_transfer")
        with prefill.frozen():
            asking = Asking(gate, question)
            sent = "the prefill leg is sent"
            gate.wait_until(sent, lambda: counted(gate, "requests_total", leg="prefill") == 1, STEP_TIMEOUT_S)
            assert gate.admin("POST", "/pause", {"mode": "hold"})[0] == 200
        gate.wait_until("the lease is over", lambda: counted(gate, "events_total", event="lease_end") == 1)
        assert gate.admin("POST", "/resume")[0] == 200
        answer = asking.wait()
        assert answer.text == alone(prefill, question)
        assert decode.prompt_tokens("external_kv_transfer") - before == answer.prompt_tokens
        assert counted(gate, "requests_total", leg="prefill") == 2


def test_a_prefill_worker_that_is_killed_between_the_legs_is_replaced(left: list[VllmEngine]) -> None:
    """Decode cannot fetch, and says so in its first event (unstreamed: by 500); another full pair answers."""
    if sum(engine.role == "prefill" for engine in left) < 2:
        pytest.fail("both prefill workers have to be there: run the whole file")
    with serve(left) as gate:
        gate.wait_healthy(len(left))
        question = Question(stream=True)
        answer, victim = killed_between_the_legs(gate, left, question)
        assert answer.text == alone(left[-1], question)
        assert answer.headers["X-Pointsman-Attempts"] == "2"
        winner = next(
            worker for worker in gate.workers() if worker["id"] == answer.headers["X-Pointsman-Prefill-Worker"]
        )
        assert winner["url"] != victim.url
        assert counted(gate, "errors_total", leg="decode", cause="error_event") == 1
        print(f"\nanswered by another pair after {answer.seconds:.2f} s", end="")
        again = [ask(gate.url, Question()) for _ in range(4)]
        assert {one.headers["X-Pointsman-Prefill-Worker"] for one in again} == {winner["id"]}


def test_decode_goes_on_alone_when_the_only_prefill_worker_is_killed(left: list[VllmEngine]) -> None:
    """Between the legs, too; afterwards nobody is sent to the dead one."""
    prefill, decode = [engine for engine in left if engine.role == "prefill"][-1], left[-1]
    with serve([prefill, decode]) as gate:
        gate.wait_healthy(2)
        question = Question()
        answer, _ = killed_between_the_legs(gate, [prefill, decode], question)
        assert answer.text == alone(decode, question)
        assert answer.headers["X-Pointsman-Attempts"] == "2"
        assert "X-Pointsman-Prefill-Worker" not in answer.headers
        print(f"\nanswered by decode alone after {answer.seconds:.2f} s", end="")
        for _ in range(4):
            question, computed = Question("/v1/chat/completions", stream=True), decode.prompt_tokens("local_compute")
            answer = ask(gate.url, question)
            assert decode.prompt_tokens("local_compute") - computed == answer.prompt_tokens
            assert answer.text == alone(decode, question)
        assert counted(gate, "events_total", event="decode_alone") == 5


def test_an_engine_that_computes_what_it_cannot_fetch_needs_no_second_attempt() -> None:
    """vLLM's `kv_load_failure_policy` recompute."""
    with vllm_engines("prefill", "decode", on_load_failure="recompute") as engines, serve(engines) as gate:
        gate.wait_healthy(2)
        question = Question(stream=True)
        answer, _ = killed_between_the_legs(gate, engines, question)
        assert answer.text == alone(engines[-1], question)
        assert "X-Pointsman-Attempts" not in answer.headers
        print(f"\ncomputed by decode after {answer.seconds:.2f} s", end="")
