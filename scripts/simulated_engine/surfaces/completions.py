"""/v1/completions: one or many prompts, as text or token ids."""

from aiohttp import web

from pointsman.scripts.simulated_engine.context import Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Ticket
from pointsman.scripts.simulated_engine.prompts import Sampling, plan_generation, read_prompts, read_sampling
from pointsman.scripts.simulated_engine.surfaces.streaming import (
    DONE,
    ERROR_EVENT,
    Delta,
    encode_event,
    iterate_deltas,
)
from pointsman.scripts.simulated_engine.surfaces.usage import describe_usage


async def complete(call: Call) -> web.StreamResponse:
    document = call.json()
    model = call.model_name(document)
    sampling = read_sampling(call, document, "max_tokens")
    planned = [plan_generation(call, p, sampling) for p in read_prompts(document.get("prompt"))]
    works = [work for work in planned for _ in range(sampling.choices)]
    head: JsonObject = {
        "id": f"{'chatcmpl' if call.context.settings.flavor == 'llamacpp' else 'cmpl'}-{call.request_id}",
        "object": "text_completion",
        "created": call.created_s,
        "model": model,
    }
    if document.get("stream"):
        ticket = call.start(works, streams=True)
        return await _stream(call, ticket, document, sampling, head)
    ticket = await call.run(works)
    choices = [_describe_choice(i, output.text, output.finish_reason) for i, output in enumerate(ticket.outputs)]
    usage = describe_usage(ticket, sampling.choices)
    return await call.send_json({**head, "choices": choices, "usage": usage})


def _describe_choice(index: int, text: str, finish_reason: str | None) -> JsonObject:
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": finish_reason,
        "stop_reason": None,
    }


async def _stream(
    call: Call, ticket: Ticket, document: JsonObject, sampling: Sampling, head: JsonObject
) -> web.StreamResponse:
    options = document.get("stream_options") or {}
    reply = call.reply
    await reply.open_stream()
    if reply.error_event is not None:
        await reply.write(ERROR_EVENT + DONE)
        return reply.opened
    async for delta in iterate_deltas(ticket):
        await reply.write_tokens(_encode_tokens(head, delta))
        if delta.finish_reason is not None and not delta.tokens:
            await reply.write(_encode_choice(head, delta.index, "", delta.finish_reason))
    if options.get("include_usage"):
        usage = describe_usage(ticket, sampling.choices)
        await reply.write(encode_event({**head, "choices": [], "usage": usage}))
    await reply.write(DONE)
    return reply.opened


def _encode_tokens(head: JsonObject, delta: Delta) -> list[bytes]:
    last = len(delta.tokens) - 1
    return [
        _encode_choice(head, delta.index, token, delta.finish_reason if i == last else None)
        for i, token in enumerate(delta.tokens)
    ]


def _encode_choice(head: JsonObject, index: int, text: str, finish_reason: str | None) -> bytes:
    return encode_event({**head, "choices": [_describe_choice(index, text, finish_reason)]})
