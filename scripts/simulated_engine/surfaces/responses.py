"""/v1/responses, as far as a client needs it to read text."""

from typing import Any

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Ticket
from pointsman.scripts.simulated_engine.prompts import plan_generation, read_sampling, render_chat
from pointsman.scripts.simulated_engine.surfaces.streaming import encode_event, iterate_deltas
from pointsman.scripts.simulated_engine.surfaces.usage import count_usage


async def respond(call: Call) -> web.StreamResponse:
    document = call.json()
    model = call.model_name(document)
    sampling = read_sampling(call, document, "max_output_tokens")
    work = plan_generation(call, _render_input(document), sampling)
    if document.get("stream"):
        return await _stream(call, call.start([work], streams=True), model)
    ticket = await call.run([work])
    return await call.send_json(_describe_response(call, ticket, model, "completed"))


def _render_input(document: JsonObject) -> bytes:
    given: Any = document.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(messages, list):
        raise ApiError(400, "input has to be a text or a list")
    if document.get("instructions"):
        messages = [{"role": "system", "content": document["instructions"]}, *messages]
    return render_chat({"messages": messages, "tools": document.get("tools")})


def _describe_response(call: Call, ticket: Ticket, model: str, status: str) -> JsonObject:
    is_complete = status == "completed"
    prompt, cached, completion = count_usage(ticket)
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }
    return {
        "id": f"resp_{call.request_id}",
        "object": "response",
        "created_at": call.created_s,
        "model": model,
        "status": status,
        "output": [_describe_item(call, ticket.outputs[0].text, status)] if is_complete else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if is_complete else None,
    }


def _describe_item(call: Call, text: str, status: str) -> JsonObject:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {
        "id": f"msg_{call.request_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


async def _stream(call: Call, ticket: Ticket, model: str) -> web.StreamResponse:
    reply = call.reply
    await reply.open_stream()
    if reply.error_event is not None:
        error = {"type": "error", "code": "server_error", "message": "simulated fault"}
        await reply.write(encode_event(error, "error"))
        return reply.opened
    created = _describe_response(call, ticket, model, "in_progress")
    await reply.write(_encode("response.created", 0, response=created))
    number = 0
    async for delta in iterate_deltas(ticket):
        events = []
        for token in delta.tokens:
            number += 1
            events.append(_encode_text(call, number, token))
        await reply.write_tokens(events)
    completed = _describe_response(call, ticket, model, "completed")
    await reply.write(_encode("response.completed", number + 1, response=completed))
    return reply.opened


def _encode_text(call: Call, number: int, token: str) -> bytes:
    return _encode(
        "response.output_text.delta",
        number,
        item_id=f"msg_{call.request_id}",
        output_index=0,
        content_index=0,
        delta=token,
        logprobs=[],
    )


def _encode(name: str, number: int, **fields: object) -> bytes:
    return encode_event({"type": name, "sequence_number": number, **fields}, name)
