"""What an engine tells about itself: health, identity, load, metrics."""

import time

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call, JsonObject
from pointsman.scripts.simulated_engine.prompts import Sampling, plan_generation
from pointsman.scripts.simulated_engine.settings import VERSIONS


async def health(call: Call) -> web.StreamResponse:
    if call.context.settings.flavor == "llamacpp":
        return await call.send_json({"status": "ok"})
    return await call.reply.send(b"")


async def health_generate(call: Call) -> web.StreamResponse:
    """Healthy means here that the engine produces a token."""
    await call.run([plan_generation(call, b"health", Sampling(max_tokens=1))])
    return await call.reply.send(b"")


async def version(call: Call) -> web.StreamResponse:
    return await call.send_json({"version": VERSIONS[call.context.settings.flavor]})


async def metrics(call: Call) -> web.StreamResponse:
    content_type = "text/plain; version=0.0.4; charset=utf-8"
    metrics = call.context.metrics
    headers = {}
    if call.context.settings.flavor == "llamacpp":
        headers["Process-Start-Time-Unix"] = str(int(metrics.started_unix_s * 1e6))
    return await call.reply.send(metrics.render(), content_type=content_type, headers=headers)


async def props(call: Call) -> web.StreamResponse:
    """Only llama.cpp: the KV memory, evenly divided among the slots."""
    settings = call.context.settings
    if settings.flavor != "llamacpp":
        raise ApiError(404, "Not Found", "NotFoundError")
    slots = settings.limits.max_sequences
    return await call.send_json(
        {
            "default_generation_settings": {"params": {}, "n_ctx": settings.limits.kv_tokens // slots},
            "total_slots": slots,
            "model_path": settings.model,
            "chat_template": "",
            "build_info": VERSIONS["llamacpp"],
        }
    )


async def models(call: Call) -> web.StreamResponse:
    return await call.send_json({"object": "list", "data": [_describe_model(call)]})


async def model(call: Call) -> web.StreamResponse:
    if call.path.removeprefix("/v1/models/") != call.context.settings.model:
        raise ApiError(404, "The model does not exist.", "NotFoundError")
    return await call.send_json(_describe_model(call))


def _describe_model(call: Call) -> JsonObject:
    settings = call.context.settings
    return {
        "id": settings.model,
        "object": "model",
        "created": int(call.context.metrics.started_unix_s),
        "owned_by": settings.flavor,
        "root": settings.model,
        "parent": None,
        "max_model_len": settings.max_model_tokens,
        "permission": [],
    }


async def model_info(call: Call) -> web.StreamResponse:
    model = call.context.settings.model
    return await call.send_json(
        {
            "model_path": model,
            "tokenizer_path": model,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": call.context.weight_version,
        }
    )


async def server_info(call: Call) -> web.StreamResponse:
    settings, transfers = call.context.settings, call.context.transfers
    return await call.send_json(
        {
            "model_path": settings.model,
            "served_model_name": settings.model,
            "weight_version": call.context.weight_version,
            "context_length": settings.max_model_tokens,
            "page_size": settings.limits.block_tokens,
            "max_total_num_tokens": settings.limits.kv_tokens,
            "max_running_requests": settings.limits.max_sequences,
            "chunked_prefill_size": settings.limits.step_tokens,
            "dp_size": 1,
            "tp_size": 1,
            "disaggregation_mode": "null" if settings.role == "regular" else settings.role,
            "disaggregation_bootstrap_port": None if transfers is None else transfers.port or None,
            "version": VERSIONS[settings.flavor],
            "status": "ready",
            "internal_states": [_describe_load(call)],
        }
    )


async def server_load(call: Call) -> web.StreamResponse:
    return await call.send_json({"server_load": call.context.journal.running})


async def rank_loads(call: Call) -> web.StreamResponse:
    load = _describe_load(call)
    return await call.send_json(
        [
            {
                "dp_rank": 0,
                "num_reqs": load["num_total_reqs"],
                "num_waiting_reqs": load["num_waiting_reqs"],
                "num_tokens": load["num_used_tokens"],
            }
        ]
    )


async def detailed_loads(call: Call) -> web.StreamResponse:
    return await call.send_json(
        {
            "timestamp": time.time(),
            "version": VERSIONS[call.context.settings.flavor],
            "dp_rank_count": 1,
            "loads": [_describe_load(call)],
        }
    )


def _describe_load(call: Call) -> JsonObject:
    settings, model = call.context.settings, call.context.model
    gauges, totals = model.gauges(), model.totals
    return {
        "dp_rank": 0,
        "num_running_reqs": gauges.running,
        "num_waiting_reqs": gauges.waiting,
        "num_waiting_uncached_tokens": gauges.waiting_tokens,
        "num_total_reqs": gauges.running + gauges.waiting,
        "num_used_tokens": gauges.kv_blocks_used * settings.limits.block_tokens,
        "max_total_num_tokens": settings.limits.kv_tokens,
        "token_usage": gauges.kv_usage,
        "gen_throughput": call.context.metrics.read_throughput(time.monotonic()),
        "cache_hit_rate": totals.cached_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0,
        "utilization": gauges.running / settings.limits.max_sequences,
        "max_running_requests": settings.limits.max_sequences,
    }
