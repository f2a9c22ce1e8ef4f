"""What an operator, or a router on the operator's behalf, does to a running engine."""

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call
from pointsman.scripts.simulated_engine.settings import Flavor


def _only(call: Call, *flavors: Flavor) -> None:
    """Other engines do not have it."""
    if call.context.settings.flavor not in flavors:
        raise ApiError(404, "Not Found", "NotFoundError")


async def flush_cache(call: Call) -> web.StreamResponse:
    """As SGLang: refused with 400 while requests run."""
    model = call.context.model
    if model.next_event_time() is not None and call.path == "/flush_cache":
        text = b"Failed to flush cache: requests are running.\n"
        return await call.reply.send(text, status=400, content_type="text/plain")
    model.flush_cache()
    return await call.reply.send(b"Cache flushed.\n", content_type="text/plain")


async def abort_request(call: Call) -> web.StreamResponse:
    """`rid`, or `abort_all`; as in SGLang an unknown id is no error."""
    document = call.json()
    request_id = document.get("rid") or ""
    if request_id or document.get("abort_all"):
        aborted = call.context.driver.abort_where(str(request_id))
        call.context.journal.aborted_total += aborted
    return await call.reply.send(b"")


async def pause_generation(call: Call) -> web.StreamResponse:
    """mode `abort` (SGLang's default) ends what runs, any other freezes it where it is."""
    if call.json().get("mode", "abort") == "abort":
        call.context.journal.aborted_total += call.context.driver.abort_where("")
    call.context.driver.pause()
    return await call.send_json({"status": "ok", "message": "Generation paused successfully."})


async def continue_generation(call: Call) -> web.StreamResponse:
    call.context.driver.resume()
    return await call.send_json({"status": "ok", "message": "Generation continued successfully."})


async def update_weights(call: Call) -> web.StreamResponse:
    context = call.context
    context.weight_updates += 1
    context.weight_version = str(call.json().get("weight_version") or context.weight_updates)
    context.model.flush_cache()
    return await call.send_json(
        {
            "success": True,
            "message": "Succeeded to update model weights.",
            "num_paused_requests": 0,
        }
    )


# --- SGLang's


async def update_weights_of_sglang(call: Call) -> web.StreamResponse:
    """From a collective call or from tensors; the body is not looked at."""
    _only(call, "sglang")
    return await update_weights(call)


async def release_memory(call: Call) -> web.StreamResponse:
    """Twice is an error, and in SGLang the end of the process."""
    _only(call, "sglang")
    context = call.context
    if context.is_asleep:
        raise ApiError(500, "the memory is released already", "InternalServerError")
    context.is_asleep = True
    context.model.flush_cache()
    return await call.send_json(None)


async def resume_memory(call: Call) -> web.StreamResponse:
    _only(call, "sglang")
    if not call.context.is_asleep:
        raise ApiError(500, "the memory is not released", "InternalServerError")
    call.context.is_asleep = False
    return await call.send_json(None)


# --- vLLM's (there only with VLLM_SERVER_DEV_MODE)


async def pause(call: Call) -> web.StreamResponse:
    """`mode` abort ends what runs and clears the cache, keep freezes it."""
    _only(call, "vllm")
    mode = call.query.get("mode", "abort")
    if mode not in ("abort", "wait", "keep"):
        raise ApiError(400, f"unknown mode {mode}")
    if mode == "abort":
        call.context.journal.aborted_total += call.context.driver.abort_where("")
        call.context.model.flush_cache()
    call.context.driver.pause()
    return await call.send_json({"status": "paused"})


async def resume(call: Call) -> web.StreamResponse:
    _only(call, "vllm")
    call.context.driver.resume()
    return await call.send_json({"status": "resumed"})


async def abort_requests(call: Call) -> web.StreamResponse:
    """Without `request_ids`, all of them."""
    _only(call, "vllm")
    ids = call.json().get("request_ids") or [""]
    aborted = sum(call.context.driver.abort_where(str(request_id)) for request_id in ids)
    call.context.journal.aborted_total += aborted
    return await call.send_json({"status": "aborted", "aborted": aborted})


async def abort_named_requests(call: Call) -> web.StreamResponse:
    """The path that every server has; it wants ids."""
    _only(call, "vllm")
    if call.json().get("request_ids") is None:
        raise ApiError(400, "Missing 'request_ids' in request body")
    return await abort_requests(call)


async def sleep(call: Call) -> web.StreamResponse:
    """Again does nothing."""
    _only(call, "vllm")
    call.context.is_asleep = True
    call.context.model.flush_cache()
    return await call.reply.send(b"")


async def wake_up(call: Call) -> web.StreamResponse:
    _only(call, "vllm")
    call.context.is_asleep = False
    return await call.reply.send(b"")


# --- of both


async def start_profile(call: Call) -> web.StreamResponse:
    """An error while one runs."""
    _only(call, "sglang", "vllm")
    if call.context.is_profiling:
        raise ApiError(500, "Profiling is already in progress", "InternalServerError")
    call.context.is_profiling = True
    return await call.reply.send(b"Start profiling.\n", content_type="text/plain")


async def stop_profile(call: Call) -> web.StreamResponse:
    _only(call, "sglang", "vllm")
    if not call.context.is_profiling:
        raise ApiError(500, "Profiling is not in progress", "InternalServerError")
    call.context.is_profiling = False
    return await call.reply.send(b"Stop profiling. This will take some time.\n", content_type="text/plain")
