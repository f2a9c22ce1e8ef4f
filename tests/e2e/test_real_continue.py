"""Real engines: a llama.cpp server is killed in the middle of a stream, another one goes on, and the text is the same.

Greedy decoding, two shards, read by the OpenAI client. The servers are killed (SIGKILL) one after the other, each at
another place of its answer; the last one left says how the whole text goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import OpenAI, Stream
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletionChunk

from pointsman.scripts.real_engines import RealEngine, launch_real_engines
from pointsman.scripts.real_model import MODEL_NAME
from tests.fakes.gateway import Gateway
from tests.fakes.live_profiles import gateway_with

PROFILE = {
    "streamFailure": "continue",
    "retry": {"initial_backoff_ms": 5},
    "timeouts": {"first_token_s": 60, "idle_s": 30},
}
TOKENS = 40
QUESTION = "Tell me a story about a fox and a river."
BEGINNING = "Once upon a time"
KILLS = (1, 9, 23)
"""pieces of text after which a server is killed"""


@pytest.fixture
def engines() -> Iterator[list[RealEngine]]:
    with launch_real_engines(len(KILLS) + 1, "--slots", "1") as running:
        yield running


@pytest.fixture
def gate(engines: list[RealEngine]) -> Iterator[Gateway]:
    urls = [engine.url for engine in engines]
    with gateway_with(PROFILE, {}, "--policy", "round_robin", workers=urls) as (running, _):
        yield running


@dataclass
class Told:
    text: str = ""
    pieces: int = 0
    ids: set[str] = field(default_factory=set)
    ends: list[str] = field(default_factory=list)
    usage: CompletionUsage | None = None


def ask(gate: Gateway, kind: str) -> Stream[ChatCompletionChunk] | Stream[Completion]:
    client = OpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=0)
    if kind == "completion":
        return client.completions.create(
            model=MODEL_NAME,
            prompt=BEGINNING,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    return client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )


def read(gate: Gateway, engines: list[RealEngine], kind: str, kill_at: int | None = None) -> Told:
    """All that the client is told; the server that answers is killed when so many pieces of text have come."""
    told = Told()
    with ask(gate, kind) as stream:
        worker = stream.response.headers["x-pointsman-worker"]
        for chunk in stream:
            told.ids.add(chunk.id)
            told.usage = chunk.usage or told.usage
            for choice in chunk.choices:
                piece = choice.text if isinstance(choice, CompletionChoice) else choice.delta.content
                told.text += piece or ""
                told.pieces += bool(piece)
                told.ends += [choice.finish_reason] if choice.finish_reason else []
            if told.pieces == kill_at:
                url = next(each["url"] for each in gate.workers() if each["id"] == worker)
                next(engine for engine in engines if engine.url == url).process.kill()
    return told


def request_lines(gate: Gateway) -> list[dict[str, Any]]:
    return [line for line in tuple(gate.log) if line["event"] == "request"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_text_is_that_of_an_unbroken_run(gate: Gateway, engines: list[RealEngine], kind: str) -> None:
    whole = read(gate, engines, kind)
    assert whole.pieces > max(KILLS)
    for number, kill_at in enumerate(KILLS):
        told = read(gate, engines, kind, kill_at)
        assert told.text == whole.text
        assert (len(told.ids), told.ends) == (1, whole.ends)
        assert told.usage is not None
        assert whole.usage is not None
        assert told.usage.completion_tokens == whole.usage.completion_tokens
        gate.wait_healthy(len(engines) - number - 1)
    gate.wait_until("every request is in the log", lambda: len(request_lines(gate)) > len(KILLS))
    assert [line.get("continuations", 0) for line in request_lines(gate)] == [0, *[1] * len(KILLS)]
