"""/generate, SGLang's own protocol. A stream repeats the text so far in every event, as SGLang does."""

from typing import Any

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Output, Ticket
from pointsman.scripts.simulated_engine.prompts import plan_generation, read_prompts, read_sampling
from pointsman.scripts.simulated_engine.surfaces.streaming import (
    DONE,
    ERROR_EVENT,
    Delta,
    encode_event,
    iterate_deltas,
)
from pointsman.scripts.simulated_engine.text import encode_tokens


async def generate(call: Call) -> web.StreamResponse:
    document = call.json()
    is_batch, prompts = _read_input(document)
    request_ids = _read_request_ids(call, document, len(prompts))
    works = [
        plan_generation(call, prompt, read_sampling(call, parameters, "max_new_tokens"))
        for prompt, parameters in zip(prompts, _read_parameters(document, len(prompts)), strict=True)
    ]
    answer = _GenerateAnswer(call, document, request_ids, is_batch)
    call.request_id = request_ids[0]
    if document.get("stream"):
        return await answer.stream(call.start(works, streams=True))
    ticket = await call.run(works)
    described = [answer.describe(i, output) for i, output in enumerate(ticket.outputs)]
    return await call.send_json(described if is_batch else described[0])


def _read_input(document: JsonObject) -> tuple[bool, list[bytes]]:
    """Whether it is a batch, and the prompts."""
    given: Any = document.get("text")
    if given is None:
        given = document.get("input_ids")
        is_batch = isinstance(given, list) and bool(given) and isinstance(given[0], list)
    else:
        is_batch = isinstance(given, list)
    if given is None:
        raise ApiError(400, "Either text or input_ids should be provided.")
    return is_batch, read_prompts(given)


def _read_parameters(document: JsonObject, count: int) -> list[JsonObject]:
    given = document.get("sampling_params") or {}
    each = given if isinstance(given, list) else [given] * count
    if len(each) != count or not all(isinstance(item, dict) for item in each):
        raise ApiError(400, "sampling_params has to be one object, or one for each prompt")
    return each


def _read_request_ids(call: Call, document: JsonObject, count: int) -> list[str]:
    given = document.get("rid") or call.request_id
    if isinstance(given, list):
        if len(given) != count:
            raise ApiError(400, "rid has to have one id for each prompt")
        return [str(item) for item in given]
    return [str(given)] if count == 1 else [f"{given}_{i}" for i in range(count)]


class _GenerateAnswer:
    def __init__(self, call: Call, document: JsonObject, request_ids: list[str], is_batch: bool) -> None:
        self._call = call
        self._request_ids = request_ids
        self._is_batch = is_batch
        self._wants_logprob = bool(document.get("return_logprob"))

    async def stream(self, ticket: Ticket) -> web.StreamResponse:
        reply = self._call.reply
        await reply.open_stream()
        if reply.error_event is not None:
            await reply.write(ERROR_EVENT + DONE)
            return reply.opened
        async for delta in iterate_deltas(ticket):
            await reply.write_tokens(self._encode(ticket.outputs[delta.index], delta))
        await reply.write(DONE)
        return reply.opened

    def describe(self, index: int, output: Output, tokens: int | None = None) -> JsonObject:
        """The answer after so many tokens, the finish reason only with the last one."""
        ready = output.sequence.generated_tokens
        shown = ready if tokens is None else tokens
        text = "".join(output.tokens[:shown])
        finish_reason = output.finish_reason if shown == ready else None
        return {
            "text": text,
            "output_ids": encode_tokens(text.encode()),
            "meta_info": self._describe_meta(index, output, text, shown, finish_reason),
        }

    def _encode(self, output: Output, delta: Delta) -> list[bytes]:
        first = delta.position + 1
        counts = range(first, first + len(delta.tokens)) if delta.tokens else (delta.position,)
        events = []
        for count in counts:
            document = self.describe(delta.index, output, count)
            if self._is_batch:
                document["index"] = delta.index
            events.append(encode_event(document))
        return events

    def _describe_meta(
        self, index: int, output: Output, text: str, shown: int, finish_reason: str | None
    ) -> JsonObject:
        sequence = output.sequence
        meta: JsonObject = {
            "id": self._request_ids[index],
            "finish_reason": _describe_finish(finish_reason, shown),
            "prompt_tokens": sequence.request.prompt_tokens,
            "weight_version": self._call.context.weight_version,
            "total_retractions": 0,
            "completion_tokens": shown,
            "cached_tokens": sequence.cached_tokens,
        }
        if finish_reason is not None and sequence.finished_s is not None:
            meta["e2e_latency"] = sequence.finished_s - sequence.arrived_s
        if self._wants_logprob:
            has_prompt = self._call.context.settings.role != "decode"
            meta["input_token_logprobs"] = _logprobs(output.prompt) if has_prompt else []
            meta["output_token_logprobs"] = _logprobs(text.encode())
        return meta


def _describe_finish(finish_reason: str | None, shown: int) -> JsonObject | None:
    if finish_reason is None:
        return None
    if finish_reason == "length":
        return {"type": "length", "length": shown}
    if finish_reason == "abort":
        return {"type": "abort", "message": "Abort in waiting queue", "status_code": None}
    return {"type": finish_reason, "matched": None}


def _logprobs(text: bytes) -> list[list[float | int | None]]:
    """[logprob, token id, text] for each token; the values only have to be recognisable."""
    return [[-(token % 1000) / 1000, token, None] for token in encode_tokens(text)]
