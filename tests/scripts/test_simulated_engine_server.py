"""The HTTP surfaces over real sockets."""

import asyncio
import base64
import hashlib
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from prometheus_client.parser import text_string_to_metric_families

from pointsman.scripts.simulated_engine import EngineLimits, EngineSettings, SimulatedEngine
from pointsman.scripts.simulated_engine.settings import FLAVORS, Flavor
from pointsman.scripts.simulated_engine.text import encode_tokens, generate_output

HELLO: Any = [{"role": "user", "content": "Say hello to the points."}]
HELLO_PROMPT = b"<|user|>\nSay hello to the points.<|end|>\n<|assistant|>\n"
LONG_TEXT = "prefix " * 200


@pytest.fixture
async def engine() -> AsyncIterator[SimulatedEngine]:
    async with SimulatedEngine() as running:
        yield running


@pytest.fixture
async def session(engine: SimulatedEngine) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(engine.url) as client:
        yield client


@pytest.fixture
async def openai(engine: SimulatedEngine) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def post(session: aiohttp.ClientSession, path: str, document: object) -> Any:
    async with session.post(path, json=document) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def get(session: aiohttp.ClientSession, path: str) -> Any:
    async with session.get(path) as response:
        assert response.status == 200
        return await response.json()


async def read_events(session: aiohttp.ClientSession, path: str, document: object) -> list[Any]:
    """The data of every event; [DONE] as a text."""
    async with session.post(path, json=document) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        lines = (await response.text()).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def wait_for(condition: Any) -> None:
    """Lets the event loop run until the condition holds."""
    async with asyncio.timeout(30):
        # The engine under test tells nobody when it changes, and is not made to for this.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_openai_sdk_gets_the_same_text_streamed_and_not(openai: AsyncOpenAI) -> None:
    whole = await openai.chat.completions.create(model="sim-model", messages=HELLO, max_tokens=9)
    stream = await openai.chat.completions.create(
        model="sim-model", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    expected = generate_output(HELLO_PROMPT, 9)
    assert whole.choices[0].message.content == "".join(expected)
    assert whole.choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-1]] == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 9 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 9
    assert whole.usage.prompt_tokens == -(-len(HELLO_PROMPT) // 4)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 9


async def test_any_two_engines_give_the_same_text(session: aiohttp.ClientSession) -> None:
    async with SimulatedEngine() as other, aiohttp.ClientSession(other.url) as other_session:
        answers = [await post(s, "/v1/completions", {"prompt": "x"}) for s in (session, other_session)]
    assert answers[0]["choices"] == answers[1]["choices"]


async def test_a_broken_chat_answer_is_continued(session: aiohttp.ClientSession) -> None:
    whole = await post(session, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 10})
    text = whole["choices"][0]["message"]["content"]
    messages = [*HELLO, {"role": "assistant", "content": text[:24]}]
    document = {"messages": messages, "max_tokens": 4, "continue_final_message": True, "add_generation_prompt": False}
    rest = await post(session, "/v1/chat/completions", document)
    assert rest["choices"][0]["message"]["content"] == text[24:]


@pytest.mark.parametrize("parameters", [{}, {"max_tokens": 3}, {"max_completion_tokens": 5, "max_tokens": 3}])
async def test_max_tokens_is_respected(session: aiohttp.ClientSession, parameters: dict[str, int]) -> None:
    answer = await post(session, "/v1/chat/completions", {"messages": HELLO, **parameters})
    expected = parameters.get("max_completion_tokens") or parameters.get("max_tokens") or 16
    assert answer["usage"]["completion_tokens"] == expected


async def test_request_id_and_engine_are_echoed(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    headers = {"x-request-id": "my-id"}
    async with session.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers) as response:
        assert response.headers["x-sim-engine"] == str(engine.port)
        assert response.headers["x-request-id"] == "my-id"
        assert (await response.json())["id"] == "chatcmpl-my-id"


async def test_a_stop_word_ends_the_answer_before_it(session: aiohttp.ClientSession) -> None:
    tokens = generate_output(b"hello", 16)
    document = {"prompt": "hello", "stop": [tokens[5]]}
    answer = await post(session, "/v1/completions", document)
    first = tokens.index(tokens[5])
    assert answer["choices"][0]["text"] == "".join(tokens[:first])
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_cached_tokens_are_reported_for_a_repeated_prefix(openai: AsyncOpenAI) -> None:
    first = await openai.completions.create(model="sim-model", prompt=LONG_TEXT)
    again = await openai.completions.create(model="sim-model", prompt=LONG_TEXT)
    longer = await openai.completions.create(model="sim-model", prompt=LONG_TEXT + first.choices[0].text + "more")
    details = [answer.usage and answer.usage.prompt_tokens_details for answer in (first, again, longer)]
    # 1400 bytes are 350 tokens, 21 full blocks of 16; with 16 output tokens 22, the last token not computed.
    assert [detail and detail.cached_tokens for detail in details] == [0, 336, 352]


async def test_many_prompts_and_choices(session: aiohttp.ClientSession) -> None:
    answer = await post(session, "/v1/completions", {"prompt": ["a", "bb"], "n": 2, "max_tokens": 2})
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts == ["".join(generate_output(p, 2)) for p in (b"a", b"a", b"bb", b"bb")]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 8


async def test_streamed_choices_carry_their_index(session: aiohttp.ClientSession) -> None:
    events = await read_events(session, "/v1/completions", {"prompt": ["a", "b"], "stream": True, "max_tokens": 3})
    assert events[-1] == "[DONE]"
    for index, prompt in enumerate((b"a", b"b")):
        own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert [choice["text"] for choice in own] == generate_output(prompt, 3)
        assert [choice["finish_reason"] for choice in own] == [None, None, "length"]


@pytest.mark.parametrize(("flavor", "role_content"), [("sglang", ""), ("llamacpp", None)])
async def test_other_flavors_finish_in_a_chunk_of_its_own(flavor: Flavor, role_content: str | None) -> None:
    async with (
        SimulatedEngine(EngineSettings(flavor=flavor)) as engine,
        aiohttp.ClientSession(engine.url) as session,
    ):
        events = await read_events(session, "/v1/chat/completions", {"messages": HELLO, "stream": True})
    choices = [event["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": role_content}
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == "".join(generate_output(HELLO_PROMPT, 16))
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == "length"


async def test_errors_are_openai_shaped(openai: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError):
        await openai.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(BadRequestError, match="non-empty list"):
        await openai.chat.completions.create(model="sim-model", messages=[])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405), ("GET", "/v1/models/x", 404)],
)
async def test_unknown_routes(session: aiohttp.ClientSession, method: str, path: str, status: int) -> None:
    async with session.request(method, path) as response:
        assert response.status == status


async def test_bad_json_is_400(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/completions", data=b'{"prompt": ') as response:
        assert response.status == 400


async def test_a_prompt_beyond_the_context_is_400() -> None:
    settings = EngineSettings(max_model_tokens=100)
    async with SimulatedEngine(settings) as engine, aiohttp.ClientSession(engine.url) as session:
        async with session.post("/v1/completions", json={"prompt": "x" * 400}) as response:
            assert response.status == 400
        answer = await post(session, "/v1/completions", {"prompt": "x" * 360, "max_tokens": 50})
    assert answer["usage"]["completion_tokens"] == 10


async def test_a_prompt_beyond_the_memory_is_400() -> None:
    settings = EngineSettings(limits=EngineLimits(kv_tokens=64))
    async with SimulatedEngine(settings) as engine, aiohttp.ClientSession(engine.url) as session:
        async with session.post("/v1/completions", json={"prompt": ["x", "x" * 400]}) as response:
            assert response.status == 400
        state = await get(session, "/_sim/state")
    assert state["engine"]["running"] == state["engine"]["waiting"] == state["requests_running"] == 0


async def test_responses(openai: AsyncOpenAI) -> None:
    whole = await openai.responses.create(model="sim-model", input="hi", max_output_tokens=4)
    stream = await openai.responses.create(model="sim-model", input="hi", max_output_tokens=4, stream=True)
    events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) == 4
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]


async def test_messages(session: aiohttp.ClientSession) -> None:
    document = {"messages": HELLO, "max_tokens": 3}
    whole = await post(session, "/v1/messages", document)
    events = await read_events(session, "/v1/messages", {**document, "stream": True})
    assert whole["content"][0]["text"] == "".join(generate_output(HELLO_PROMPT, 3))
    assert whole["stop_reason"] == "max_tokens"
    names = [event["type"] for event in events]
    deltas = ["content_block_delta"] * 3
    assert names == [
        *("message_start", "content_block_start", *deltas, "content_block_stop", "message_delta", "message_stop")
    ]
    assert "".join(event["delta"]["text"] for event in events[2:5]) == whole["content"][0]["text"]


async def test_embeddings_as_numbers_and_base64(session: aiohttp.ClientSession) -> None:
    document = {"input": ["one", "two"], "dimensions": 8}
    plain = await post(session, "/v1/embeddings", document)
    packed = await post(session, "/v1/embeddings", {**document, "encoding_format": "base64"})
    for a, b in zip(plain["data"], packed["data"], strict=True):
        values = struct.unpack("<8f", base64.b64decode(b["embedding"]))
        assert a["embedding"] == pytest.approx(values)
    assert plain["usage"]["completion_tokens"] == 0
    assert plain["data"][0] != plain["data"][1]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
async def test_rerank_orders_by_relevance(session: aiohttp.ClientSession, path: str) -> None:
    document = {"query": "red green blue", "documents": ["nothing here", "red and green", "red green blue"], "top_n": 2}
    answer = await post(session, path, document)
    assert [result["index"] for result in answer["results"]] == [2, 1]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_score(session: aiohttp.ClientSession, path: str) -> None:
    answer = await post(session, path, {"text_1": "red", "text_2": ["red", "blue"]})
    assert answer["data"][0]["score"] > answer["data"][1]["score"]


async def test_pooling_and_classify(session: aiohttp.ClientSession) -> None:
    pooled = await post(session, "/pooling", {"input": "x"})
    assert pooled["data"][0]["object"] == "pooling"
    classified = await post(session, "/v1/classify", {"input": ["x", "y"]})
    assert [sum(item["probs"]) for item in classified["data"]] == pytest.approx([1, 1])


async def test_tokenize_and_detokenize(session: aiohttp.ClientSession) -> None:
    answer = await post(session, "/tokenize", {"prompt": "hello world"})
    assert answer["count"] == 3
    assert (await post(session, "/detokenize", {"tokens": answer["tokens"]}))["prompt"] == "hello world"
    chat = await post(session, "/tokenize", {"messages": HELLO})
    assert chat["tokens"] == encode_tokens(HELLO_PROMPT)


async def test_transcription_says_how_large_the_file_was(openai: AsyncOpenAI) -> None:
    audio = bytes(range(256)) * 400
    answer = await openai.audio.transcriptions.create(model="sim-model", file=("speech.wav", audio))
    assert answer.text == f"{len(audio)} bytes of audio"


async def test_generate_of_text_and_of_its_ids_is_the_same(session: aiohttp.ClientSession) -> None:
    text = "text of 24 bytes, or six"
    parameters = {"sampling_params": {"max_new_tokens": 5}}
    by_text = await post(session, "/generate", {"text": text, **parameters})
    by_ids = await post(session, "/generate", {"input_ids": encode_tokens(text.encode()), "rid": "r1", **parameters})
    assert by_text["text"] == by_ids["text"] == "".join(generate_output(text.encode(), 5))
    assert by_ids["output_ids"] == encode_tokens(by_text["text"].encode())
    meta = by_ids["meta_info"]
    assert meta["id"] == "r1"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (6, 5)


async def test_generate_batch(session: aiohttp.ClientSession) -> None:
    document = {
        "text": ["a", "b"],
        "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        "return_logprob": True,
    }
    answers = await post(session, "/generate", document)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 2]
    assert [len(answer["meta_info"]["output_token_logprobs"]) for answer in answers] == [1, 2]


async def test_generate_stream_repeats_the_text_so_far(session: aiohttp.ClientSession) -> None:
    events = await read_events(session, "/generate", {"text": "a", "stream": True})
    expected = generate_output(b"a", 16)
    assert [event["text"] for event in events[:-1]] == ["".join(expected[: i + 1]) for i in range(16)]
    reasons = [event["meta_info"]["finish_reason"] for event in events[:-1]]
    assert reasons == [None] * 15 + [{"type": "length", "length": 16}]
    assert events[-1] == "[DONE]"


async def test_identity(session: aiohttp.ClientSession) -> None:
    assert (await get(session, "/v1/models"))["data"][0]["id"] == "sim-model"
    assert (await get(session, "/v1/models/sim-model"))["max_model_len"] == 131_072
    assert (await get(session, "/version"))["version"]
    for path in ("/get_model_info", "/model_info"):
        assert (await get(session, path))["model_path"] == "sim-model"
    for path in ("/get_server_info", "/server_info"):
        assert (await get(session, path))["max_total_num_tokens"] == 400_000
    assert (await get(session, "/load")) == {"server_load": 0}


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/ping", "/ready", "/metrics"])
async def test_probes(session: aiohttp.ClientSession, path: str) -> None:
    for method in ("GET", "HEAD"):
        async with session.request(method, path) as response:
            assert response.status == 200


@pytest.mark.parametrize("flavor", FLAVORS)
async def test_metrics_have_the_names_of_the_flavor(flavor: Flavor) -> None:
    names = {
        "vllm": ("vllm:num_requests_running", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        "sglang": ("sglang:num_running_reqs", "sglang:prompt_tokens_total", "sglang:generation_tokens_total"),
        "llamacpp": (
            "llamacpp:requests_processing",
            "llamacpp:prompt_tokens_total",
            "llamacpp:tokens_predicted_total",
        ),
    }
    async with (
        SimulatedEngine(EngineSettings(flavor=flavor)) as engine,
        aiohttp.ClientSession(engine.url) as session,
    ):
        await post(session, "/v1/completions", {"prompt": "x" * 40, "max_tokens": 7})
        async with session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            values = {sample.name: sample.value for family in families for sample in family.samples}
    assert [values[name] for name in names[flavor]] == [0, 10, 7]
    assert values["process_start_time_seconds"] > 1e9


async def test_loads_show_what_runs(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    engine.context.driver.pause()
    request = asyncio.create_task(post(session, "/v1/completions", {"prompt": "x" * 100}))
    await wait_for(lambda: engine.context.model.running)
    assert (await get(session, "/get_load"))[0]["num_reqs"] == 1
    assert (await get(session, "/v1/loads"))["loads"][0]["num_used_tokens"] == 48
    assert (await get(session, "/load")) == {"server_load": 1}
    engine.context.driver.resume()
    await request
    assert (await get(session, "/get_load"))[0]["num_tokens"] == 0


async def test_flush_is_refused_while_requests_run(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    engine.context.driver.pause()
    request = asyncio.create_task(post(session, "/v1/completions", {"prompt": LONG_TEXT}))
    await wait_for(lambda: engine.context.model.running)
    async with session.post("/flush_cache") as response:
        assert response.status == 400
    engine.context.driver.resume()
    await request
    async with session.post("/flush_cache") as response:
        assert response.status == 200
    assert engine.context.model.cache.cached_blocks == 0


@pytest.mark.parametrize("document", [{"rid": "victim"}, {"abort_all": True}])
async def test_abort_request(engine: SimulatedEngine, session: aiohttp.ClientSession, document: object) -> None:
    engine.context.driver.pause()
    generate = post(session, "/generate", {"text": "x", "rid": "victim"})
    request = asyncio.create_task(generate)
    await wait_for(lambda: engine.context.model.running)
    async with session.post("/abort_request", json=document) as response:
        assert response.status == 200
    answer = await request
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.context.journal.aborted_total == 1


async def test_paused_generation_continues(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    await post(session, "/pause_generation", {"mode": "in_place"})
    request = asyncio.create_task(post(session, "/v1/completions", {"prompt": "x"}))
    await wait_for(lambda: engine.context.model.running)
    assert (await get(session, "/_sim/state"))["is_paused"]
    await post(session, "/continue_generation", {})
    assert (await request)["usage"]["completion_tokens"] == 16


async def test_new_weights_have_a_version_and_an_empty_cache(session: aiohttp.ClientSession) -> None:
    await post(session, "/v1/completions", {"prompt": LONG_TEXT})
    assert (await post(session, "/update_weights_from_disk", {"model_path": "x"}))["success"]
    assert (await get(session, "/model_info"))["weight_version"] == "1"
    again = await post(session, "/v1/completions", {"prompt": LONG_TEXT})
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_sequence(engine: SimulatedEngine, stream: bool) -> None:
    context = engine.context
    context.driver.pause()
    async with aiohttp.ClientSession(engine.url) as session:
        document = {"prompt": "x" * 1000, "stream": stream}
        headers = {"x-request-id": "leaver"}
        request = asyncio.create_task(session.post("/v1/completions", json=document, headers=headers).__aenter__())
        await wait_for(lambda: context.model.running)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await wait_for(lambda: context.journal.disconnects_total)
    assert context.model.running == 0
    assert context.model.cache.used_blocks == 0
    assert context.journal.running == 0
    assert context.journal.aborted_total == 1
    assert context.journal.disconnects[0]["request_id"] == "leaver"
    assert context.journal.records[0].outcome == "disconnect"


async def test_state_shows_the_raw_requests(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    body = b'{"prompt":  "spaces stay",\n"unknown": 1}'
    async with session.post("/v1/completions", data=body, headers={"X-Mixed-Case": "Kept"}) as response:
        await response.read()
    state = await get(session, "/_sim/state")
    record = state["requests"][0]
    assert record["method"] == "POST"
    assert record["path"] == "/v1/completions"
    assert ["X-Mixed-Case", "Kept"] in record["headers"]
    assert record["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert base64.b64decode(record["body_base64"]) == body
    assert record["outcome"] == "200"
    assert state["requests_total"] == 1
    assert state["connections_total"] == state["connections_open"] == 1
    assert state["max_concurrent"] == 1


async def test_only_the_last_bodies_are_kept(session: aiohttp.ClientSession) -> None:
    for number in range(20):
        await post(session, "/tokenize", {"prompt": str(number)})
    records = (await get(session, "/_sim/state"))["requests"]
    assert [record["body_base64"] is None for record in records] == [True] * 4 + [False] * 16


async def test_reset_forgets(session: aiohttp.ClientSession) -> None:
    await post(session, "/v1/completions", {"prompt": LONG_TEXT})
    await post(session, "/_sim/faults", [{"kind": "status"}])
    await post(session, "/_sim/reset", {})
    state = await get(session, "/_sim/state")
    assert state["requests"] == state["faults"] == []
    assert state["engine"]["kv_blocks_cached"] == 0


async def test_restart_begins_anew(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    await post(session, "/v1/completions", {"prompt": LONG_TEXT})
    before = engine.context.metrics.started_unix_s
    await post(session, "/_sim/restart", {})
    assert engine.context.metrics.started_unix_s > before
    assert engine.context.model.cache.cached_blocks == 0


async def test_a_compressed_body_is_understood_and_kept_raw(session: aiohttp.ClientSession) -> None:
    async with session.post("/tokenize", json={"prompt": "12345678"}, compress="gzip") as response:
        assert (await response.json())["count"] == 2
    record = (await get(session, "/_sim/state"))["requests"][0]
    assert base64.b64decode(record["body_base64"])[:2] == b"\x1f\x8b"


async def test_timing_follows_the_preset(session: aiohttp.ClientSession) -> None:
    """16 steps of at least 7 ms of model time; at 20 times the speed a twentieth of that."""
    settings = EngineSettings(preset="h100-8b", speed=20.0)
    async with SimulatedEngine(settings) as engine, aiohttp.ClientSession(engine.url) as client:
        loop = asyncio.get_running_loop()
        before = loop.time()
        answer = await post(client, "/generate", {"text": "x" * 400})
        elapsed = loop.time() - before
    latency = answer["meta_info"]["e2e_latency"]
    assert latency == pytest.approx(16 * 7e-3 + 28e-6 * 100 + 15 * 15e-6, rel=0.05)
    assert elapsed >= latency / 20
