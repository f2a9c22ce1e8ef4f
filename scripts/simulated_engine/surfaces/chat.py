"""/v1/chat/completions, streamed the way the engine of this flavor does it.

vLLM puts the finish reason on the last token's chunk; SGLang and llama.cpp send one more chunk for it.
"""

from aiohttp import web

from pointsman.scripts.simulated_engine.context import Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Output, Ticket
from pointsman.scripts.simulated_engine.prompts import Sampling, plan_generation, read_sampling, render_chat
from pointsman.scripts.simulated_engine.surfaces.streaming import (
    DONE,
    ERROR_EVENT,
    Delta,
    encode_event,
    iterate_deltas,
)
from pointsman.scripts.simulated_engine.surfaces.usage import describe_usage


async def complete_chat(call: Call) -> web.StreamResponse:
    document = call.json()
    model = call.model_name(document)
    sampling = read_sampling(call, document, "max_completion_tokens", "max_tokens")
    work = plan_generation(call, render_chat(document), sampling)
    works = [work] * sampling.choices
    if document.get("stream"):
        ticket = call.start(works, streams=True)
        return await _stream(call, ticket, document, sampling, model)
    ticket = await call.run(works)
    return await call.send_json(
        {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion",
            "created": call.created_s,
            "model": model,
            "choices": [_describe_choice(i, output) for i, output in enumerate(ticket.outputs)],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": describe_usage(ticket, sampling.choices),
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        }
    )


def _describe_choice(index: int, output: Output) -> JsonObject:
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": output.text,
            "refusal": None,
            "tool_calls": [],
            "reasoning_content": None,
        },
        "logprobs": None,
        "finish_reason": output.finish_reason,
        "stop_reason": None,
    }


async def _stream(
    call: Call, ticket: Ticket, document: JsonObject, sampling: Sampling, model: str
) -> web.StreamResponse:
    options = document.get("stream_options") or {}
    chunks = _ChatChunks(call, model)
    reply = call.reply
    await reply.open_stream()
    if reply.error_event is not None:
        await reply.write(ERROR_EVENT + DONE)
        return reply.opened
    roles = b"".join(chunks.role(index) for index in range(len(ticket.outputs)))
    async for delta in iterate_deltas(ticket):
        if roles:
            await reply.write(roles)
            roles = b""
        await reply.write_tokens(chunks.tokens(delta))
        if delta.finish_reason is not None:
            await reply.write(chunks.finish(delta))
    if options.get("include_usage"):
        usage = describe_usage(ticket, sampling.choices)
        await reply.write(encode_event({**chunks.head, "choices": [], "usage": usage}))
    await reply.write(DONE)
    return reply.opened


class _ChatChunks:
    """A token's chunk is a constant but for index and text, and there are many of them."""

    def __init__(self, call: Call, model: str) -> None:
        self.head: JsonObject = {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion.chunk",
            "created": call.created_s,
            "model": model,
        }
        self._flavor = call.context.settings.flavor
        self._finishes_with_token = self._flavor == "vllm"
        self._before: dict[int, bytes] = {}

    def role(self, index: int) -> bytes:
        content = None if self._flavor == "llamacpp" else ""
        return self._encode(index, {"role": "assistant", "content": content}, None)

    def tokens(self, delta: Delta) -> list[bytes]:
        before = self._prefix(delta.index)
        events = [before + token.encode() + b'"},"logprobs":null,"finish_reason":null}]}\n\n' for token in delta.tokens]
        if self._finishes_with_token and delta.finish_reason is not None and events:
            events[-1] = self._encode(delta.index, {"content": delta.tokens[-1]}, delta.finish_reason)
        return events

    def finish(self, delta: Delta) -> bytes:
        """The chunk with nothing but the finish reason, where there is one."""
        if self._finishes_with_token and delta.tokens:
            return b""
        return self._encode(delta.index, {}, delta.finish_reason)

    def _prefix(self, index: int) -> bytes:
        prefix = self._before.get(index)
        if prefix is None:
            marked = self._encode(index, {"content": "\0"}, None)
            prefix = self._before[index] = marked.partition(b"\\u0000")[0]
        return prefix

    def _encode(self, index: int, delta: JsonObject, finish_reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        document = {**self.head, "choices": [choice]}
        if self._flavor == "llamacpp" and finish_reason is not None:
            document["timings"] = {"prompt_n": 0, "predicted_n": 0}
        return encode_event(document)
