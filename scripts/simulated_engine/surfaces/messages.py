"""/v1/messages, Anthropic's shape."""

from aiohttp import web

from pointsman.scripts.simulated_engine.context import Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Ticket
from pointsman.scripts.simulated_engine.prompts import plan_generation, read_sampling, render_chat
from pointsman.scripts.simulated_engine.surfaces.streaming import Delta, encode_event, iterate_deltas
from pointsman.scripts.simulated_engine.surfaces.usage import count_usage

_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn", "abort": "end_turn"}


async def create_message(call: Call) -> web.StreamResponse:
    document = call.json()
    model = call.model_name(document)
    sampling = read_sampling(call, document, "max_tokens")
    work = plan_generation(call, render_chat(_with_system(document)), sampling)
    if document.get("stream"):
        return await _stream(call, call.start([work], streams=True), model)
    ticket = await call.run([work])
    output = ticket.outputs[0]
    message = _describe_message(call, ticket, model)
    message["content"] = [{"type": "text", "text": output.text}]
    message["stop_reason"] = _STOP_REASONS[output.finish_reason or "stop"]
    return await call.send_json(message)


def _with_system(document: JsonObject) -> JsonObject:
    if not document.get("system"):
        return document
    system = {"role": "system", "content": document["system"]}
    return {**document, "messages": [system, *(document.get("messages") or [])]}


def _describe_message(call: Call, ticket: Ticket, model: str) -> JsonObject:
    return {
        "id": f"msg_{call.request_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _describe_usage(ticket),
    }


def _describe_usage(ticket: Ticket) -> JsonObject:
    prompt, cached, completion = count_usage(ticket)
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion,
    }


async def _stream(call: Call, ticket: Ticket, model: str) -> web.StreamResponse:
    reply = call.reply
    await reply.open_stream()
    if reply.error_event is not None:
        error = {"type": "api_error", "message": "simulated fault"}
        await reply.write(_encode("error", error=error))
        return reply.opened
    begin = b""
    finish_reason = None
    async for delta in iterate_deltas(ticket):
        if not begin:
            begin = _encode("message_start", message=_describe_message(call, ticket, model))
            block = {"type": "text", "text": ""}
            begin += _encode("content_block_start", index=0, content_block=block)
            await reply.write(begin)
        await reply.write_tokens(_encode_tokens(delta))
        finish_reason = delta.finish_reason
    ends = {"stop_reason": _STOP_REASONS[finish_reason or "stop"], "stop_sequence": None}
    await reply.write(
        _encode("content_block_stop", index=0)
        + _encode("message_delta", delta=ends, usage=_describe_usage(ticket))
        + _encode("message_stop")
    )
    return reply.opened


def _encode_tokens(delta: Delta) -> list[bytes]:
    return [
        _encode("content_block_delta", index=0, delta={"type": "text_delta", "text": token}) for token in delta.tokens
    ]


def _encode(name: str, **fields: object) -> bytes:
    return encode_event({"type": name, **fields}, name)
