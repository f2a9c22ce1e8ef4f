"""An unmodified OpenAI client, streamed and not, through two shards, gets the same text as from the engine itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import APIStatusError, NotFoundError, OpenAI

from pointsman.scripts.real_engines import launch_real_engines
from pointsman.scripts.real_model import MODEL_NAME
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway

MODEL = "sim-model"
PROMPTS = [f"Count from {n} to {n + 3}, in words please." for n in range(8)]


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--model", MODEL) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway("--policy", "round-robin", workers=engines) as running:
        yield running


def ask(client: OpenAI, model: str, prompt: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=12, temperature=0, seed=1
    )
    return answer.choices[0].message.content or ""


def ask_streamed(client: OpenAI, model: str, prompt: str) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=12,
        temperature=0,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    assert usage is not None
    assert usage.completion_tokens > 0
    return text


def same_text_everywhere(engines: list[str], gate_url: str, model: str, prompts: list[str]) -> None:
    with client_of(engines[0]) as direct, client_of(gate_url) as through:
        for prompt in prompts:
            expected = ask(direct, model, prompt)
            assert expected
            assert ask(through, model, prompt) == expected
            assert ask_streamed(through, model, prompt) == expected
            assert ask_streamed(direct, model, prompt) == expected


def test_simulated_engines(engines: list[str], gate: Gateway) -> None:
    same_text_everywhere(engines, gate.url, MODEL, PROMPTS)
    picks = [worker["picks"] for worker in gate.workers()]
    assert min(picks) > 0, "round robin uses both"


def test_the_rest_of_the_sdk(gate: Gateway) -> None:
    with client_of(gate.url) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        assert client.completions.create(model=MODEL, prompt="hello", max_tokens=3).choices[0].text
        assert client.embeddings.create(model=MODEL, input=["a", "b"]).data[1].embedding
        assert client.responses.create(model=MODEL, input="hello").output_text
        with pytest.raises(NotFoundError):
            client.models.retrieve("nothing")
        with pytest.raises(APIStatusError) as error:
            client.post("/nowhere", cast_to=object, body={})
        assert error.value.status_code == 404


def test_real_engines() -> None:
    """llama.cpp with a 135M-parameter model: text equals a direct call, greedy."""
    with (
        launch_real_engines(2, "--slots", "2") as engines,
        gateway("--policy", "round-robin", workers=[engine.url for engine in engines]) as gate,
    ):
        same_text_everywhere([engine.url for engine in engines], gate.url, MODEL_NAME, PROMPTS[:2])
        assert all(worker["picks"] > 0 for worker in gate.workers())
