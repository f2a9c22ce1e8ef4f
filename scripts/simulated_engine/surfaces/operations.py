"""What an operator, or a router on the operator's behalf, does to a running engine."""

from aiohttp import web

from pointsman.scripts.simulated_engine.context import Call


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
